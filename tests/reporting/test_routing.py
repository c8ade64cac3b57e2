import numpy as np
import pytest

from moadapt.reporting.routing import moved, routing
from tests.reporting.parsed_page import ParsedPage


def test_moved_is_half_the_sum_of_differences_of_shares() -> None:
    weights = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [0.5, 0.5]], [[0.2, 0.8], [0.6, 0.4]]])
    assert moved(weights)[0, 1] == pytest.approx([1.0, 0.0, (0.4 + 0.4) / 2])


def test_moved_scales_weights_that_do_not_sum_to_one() -> None:
    weights = np.array([[[0.2, 0.2], [1.5, 0.5]]])
    assert moved(weights)[0, 1] == pytest.approx([0.25])


def test_moved_of_a_routing_to_nobody_is_finite() -> None:
    assert moved(np.array([[[0.0, 0.0], [1.0, 0.0]]]))[0, 1] == pytest.approx([0.5])


def test_sentence_says_the_numbers() -> None:
    table = {
        "experts": ["a", "b"],
        "places": ["language.0", "language.1"],
        "tasks": ["a", "b"],
        "weights": [[[0.5, 0.5], [0.5, 0.5]], [[0.9, 0.1], [0.3, 0.7]]],
    }
    page = ParsedPage(routing(table))
    said = page.all("p", "finding")[0].words
    assert "on average 30.0 % of the weight" in said  # 0 at the first place, 0.6 at the second
    assert "at language.1 (60.0 %)" in said
    assert "70.0 % for a, 60.0 % for b" in said
    assert "even split would be 50.0 %" in said
    assert [figure.words for figure in page.all("figcaption")] == ["a", "b"]


def test_one_task_has_a_map_and_no_difference() -> None:
    table = {"experts": ["a", "b"], "places": ["model"], "tasks": ["q"], "weights": [[[0.25, 0.75]]]}
    page = ParsedPage(routing(table))
    assert page.all("p", "finding") == []
    assert "0.25" in page.all("svg")[0].words


def test_many_places_keep_the_map_small() -> None:
    places = [f"model.layers.{n}.self_attn.q_proj" for n in range(300)]
    table = {"experts": ["a"], "places": places, "tasks": ["q"], "weights": [[[1.0]]] * 300}
    page = ParsedPage(routing(table))
    height = float(page.all("svg")[0].attributes["viewbox"].split()[3])
    assert height < 1000
    assert "1.00" not in page.all("svg")[0].words
