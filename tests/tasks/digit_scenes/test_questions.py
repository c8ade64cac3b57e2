import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from moadapt_tasks.digit_scenes.questions import Question, ask
from moadapt_tasks.digit_scenes.scenes import COLORS, Scene, draw_scene

SCENES = 400


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, list[Question]]]:
    scenes = [draw_scene("validation", index, 5) for index in range(SCENES)]
    return [(scene, ask(scene, 6, np.random.default_rng(index))) for index, scene in enumerate(scenes)]


def right_answers(scene: Scene, text: str) -> set[str]:
    """Answer from the table of digits, colours and centres alone; more than one answer is an ambiguous question."""
    table = [(str(t.digit), t.color, t.center[0], t.center[1]) for t in scene.objects]
    if found := re.fullmatch(r"what digit is (\w+)\?", text):
        return {digit for digit, color, *_ in table if color == found[1]} if colors(table, found[1]) == 1 else set()
    if found := re.fullmatch(r"what color is the (\d)\?", text):
        shown = [color for digit, color, *_ in table if digit == found[1]]
        return set(shown) if len(shown) == 1 else set()
    if text == "how many digits are there?":
        return {str(len(table))}
    if found := re.fullmatch(r"how many (\w+) digits are there\?", text):
        return {str(colors(table, found[1]))}
    if found := re.fullmatch(r"is there a (\w+) (\d|digit)\?", text):
        return {
            "yes" if any(color == found[1] and found[2] in (digit, "digit") for digit, color, *_ in table) else "no"
        }
    found = re.fullmatch(r"what is (left of|right of|above|below) the (\w+) (\d)\?", text)
    assert found is not None, text
    return neighbours(table, *found.groups())


def colors(table: list[tuple[str, str, float, float]], color: str) -> int:
    return [row[1] for row in table].count(color)


def neighbours(table: list[tuple[str, str, float, float]], side: str, color: str, digit: str) -> set[str]:
    _, _, x, y = next(row for row in table if row[:2] == (digit, color))
    away = {
        (one, other): {"left of": x - left, "right of": left - x, "above": y - top, "below": top - y}[side]
        for one, other, left, top in table
    }
    there = [row for row in table if away[row[:2]] > 0]
    if not there:
        return {"nothing"}
    by_order = min(there, key=lambda row: away[row[:2]])
    by_distance = min(there, key=lambda row: (row[2] - x) ** 2 + (row[3] - y) ** 2)
    return {f"{row[1]} {row[0]}" for row in (by_order, by_distance)}


def test_ask_gives_the_only_right_answer(asked: list[tuple[Scene, list[Question]]]) -> None:
    for scene, questions in asked:
        for question in questions:
            assert right_answers(scene, question.text) == {question.answer}, (question, scene.objects)


def test_ask_never_repeats_itself_and_takes_the_kinds_in_turn(asked: list[tuple[Scene, list[Question]]]) -> None:
    for _, questions in asked:
        assert len({question.text for question in questions}) == len(questions) == 6
        kinds = Counter(question.kind for question in questions)
        assert len(kinds) >= 4  # a scene of two alike may bear no question of one kind
    uses = Counter(question.kind for _, questions in asked for question in questions)
    assert set(uses) == {"digit", "color", "count", "existence", "neighbour"}
    assert min(uses.values()) > SCENES / 2


def test_answers_are_balanced(asked: list[tuple[Scene, list[Question]]]) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, questions in asked:
        for question in questions:
            answers[question.kind][question.answer] += 1
    yes, no = answers["existence"]["yes"], answers["existence"]["no"]
    assert abs(yes - no) < 4 * np.sqrt(yes + no)  # four standard deviations of a fair coin
    assert set(answers["color"]) == set(COLORS)
    assert set(answers["digit"]) == set("0123456789")
    assert set(answers["count"]) >= set("01234")
    assert max(answers["count"].values()) < 0.5 * answers["count"].total()
    assert answers["neighbour"]["nothing"] < 0.3 * answers["neighbour"].total()


def test_ask_stops_where_a_scene_bears_no_more() -> None:
    scene = draw_scene("test", 0)
    questions = ask(scene, 1000, np.random.default_rng(0))
    assert 6 < len(questions) < 60
    assert len({question.text for question in questions}) == len(questions)


def test_ask_depends_on_its_random_numbers_only() -> None:
    scene = draw_scene("test", 0)
    first, again, other = (ask(scene, 6, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
