import re

from matplotlib.axes import Axes

from moadapt.reporting.chart import chart
from moadapt.reporting.palette import RUNS, SHADES, shade_of, variables
from moadapt.reporting.paths import shortened
from tests.reporting.parsed_page import ParsedPage


def drawn(axes: Axes) -> None:
    axes.plot([0, 1], [0, 1], color=shade_of("mixture").light)
    axes.set_title("a < $b$ & \N{CJK UNIFIED IDEOGRAPH-4E2D}")


def test_chart_takes_colours_and_font_from_the_page() -> None:
    svg = chart(drawn, width=200, height=100, name="one", label="a line")
    assert "stroke: var(--run-mixture)" in svg
    assert not [shade.light for shade in SHADES if shade.light in svg]
    assert "font-family" not in svg
    assert "font:" not in svg
    assert "<style" not in svg


def test_chart_keeps_hostile_text_as_text() -> None:
    page = ParsedPage(chart(drawn, width=200, height=100, name="one", label="x"))
    assert "a < $b$ & \N{CJK UNIFIED IDEOGRAPH-4E2D}" in page.all("svg")[0].words


def test_charts_of_one_page_share_no_identity() -> None:
    first, second = (chart(drawn, width=200, height=100, name=name, label="x") for name in ("one", "two"))
    identities = [set(re.findall(r'\bid="([^"]*)"', svg)) for svg in (first, second)]
    assert identities[0]
    assert not identities[0] & identities[1]


def test_every_colour_is_told_apart_from_every_other() -> None:
    assert len({shade.light for shade in SHADES}) == len(SHADES)
    assert len({shade.variable for shade in SHADES}) == len(SHADES)
    assert len({shade.dark for shade in RUNS.values()}) == len(RUNS)
    assert f"{shade_of('base').variable}:{shade_of('base').dark};" in variables(dark=True)


def test_shortened_keeps_short_paths() -> None:
    assert shortened(["a.b", "a.c"]) == ["a.b", "a.c"]


def test_shortened_clips_the_start_of_what_is_still_long() -> None:
    (clipped,) = shortened(["model.language_model.layers.0.self_attn.q_proj"])
    assert clipped == "…" + "model.language_model.layers.0.self_attn.q_proj"[-29:]


def test_shortened_drops_what_all_share() -> None:
    towers = ["model.vision_tower.layers.0.fc1", "model.language_model.layers.0.up_proj"]
    assert shortened(towers) == ["vision_tower.fc1", "language_model.up_proj"]
