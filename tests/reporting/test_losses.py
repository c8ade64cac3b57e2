import numpy as np
import pytest

from moadapt.reporting.losses import finite, losses, smoothed
from tests.reporting.parsed_page import ParsedPage


def test_finite_keeps_what_a_logarithm_can_show_in_order() -> None:
    points = [[3, 0.5], [1, 2.0], [2, float("nan")], [4, 0.0], [5, float("inf")]]
    assert finite(points).tolist() == [[1, 2.0], [3, 0.5]]
    assert finite([]).shape == (0, 2)


def test_smoothed_averages_a_window_and_what_is_there_at_the_ends() -> None:
    values = np.arange(80.0) ** 2
    means = smoothed(values)
    reach = 2  # 5 % of 80 points to both sides together
    assert means[40] == pytest.approx(values[40 - reach : 40 + reach + 1].mean())
    assert means[0] == pytest.approx(values[: reach + 1].mean())
    assert means[-1] == pytest.approx(values[-reach - 1 :].mean())
    assert smoothed(np.array([3.0])).tolist() == [3.0]


def test_a_chart_for_each_task_with_the_runs_that_have_it() -> None:
    curve = [[1, 2.0], [2, 1.0]]
    page = ParsedPage(losses({"single_lora": {"all": curve}, "mixture": {"all": curve, "vqa": curve}}))
    assert [caption.words for caption in page.all("figcaption")] == ["All tasks", "Visual question answering"]
    first, second = page.all("svg")
    assert first.attributes["aria-label"].endswith("single_lora, mixture")
    assert second.attributes["aria-label"].endswith("for mixture")
