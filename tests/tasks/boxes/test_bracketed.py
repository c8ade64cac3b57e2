"""Numbers in brackets are read from what models really write."""

import pytest

from moadapt_tasks.boxes.bracketed import find_numbers, write_numbers

ONE, TWO = (10.0, 20.0, 30.0, 40.0), (50.0, 60.0, 70.0, 80.0)


def test_numbers_are_written_in_steps_of_each_side() -> None:
    assert write_numbers((0.1, 0.5, 0.25, 1.0), (100, 1000)) == "[10, 500, 25, 1000]"


def test_numbers_are_read_in_fractions_of_each_side() -> None:
    assert find_numbers("[10, 500, 25, 1000]", (100, 1000)) == [(0.1, 0.5, 0.25, 1.0)]


@pytest.mark.parametrize(
    "text",
    [
        "[10, 20, 30, 40]",
        "[10,20,30,40]",
        "[ 10 , 20 ,30, 40 ]",
        "[10 20 30 40]",
        "[10.0, 20.00, 30, 40.]",
        "[10, 20, 30, 40,]",
        "[10, 20, 30, 40, ]",
        "(10, 20, 30, 40)",
        "[[10, 20, 30, 40]]",
        "[(10, 20, 30, 40)]",
        '["10", "20", "30", "40"]',
        '{"bbox_2d": [10, 20, 30, 40], "label": "cat"}',
        '[{"bbox_2d": [10, 20, 30, 40], "label": "cat",},]',
        "{'bbox_2d': [10, 20, 30, 40], 'label': 'the man\\'s hat (left)'}",
        '{"bbox_2d": "[10, 20, 30, 40]"}',
        '```json\n[\n\t{"bbox_2d": [10, 20, 30, 40], "label": "cat"}\n]\n```',
        '```json\n[{"bbox_2d": [10, 20, 30, 40], "label": "cat"',
        '{"label": "player [7]", "bbox_2d":\n[10,\n20,\n30,\n40\n]}',
        "(10, 20), (30, 40)",
        "(10,20),(30,40)",
        "[[10, 20], [30, 40]]",
        "<|box_start|>(10,20),(30,40)<|box_end|>",
        "<ref>cat</ref><box>[[10, 20, 30, 40]]</box>",
        "it spans [10, 20, 30, 40] (of 100, 100)",
        '{"bbox_2d": [10, 20, 30, 40], "point_2d": [15, 25]}',
        "[10, 20, 30, 40], [50, 60, 70, 8",
        "[10, 20, 30, 40], [50, 60,",
    ],
)
def test_one_box_is_read(text: str) -> None:
    assert find_numbers(text, (1, 1)) == [ONE]


@pytest.mark.parametrize(
    "text",
    [
        "[10, 20, 30, 40], [50, 60, 70, 80]",
        "[10, 20, 30, 40][50, 60, 70, 80]",
        "[10,20,30,40;50,60,70,80]",
        "[[10, 20, 30, 40], [50, 60, 70, 80],]",
        '{"bbox_2d": [[10, 20, 30, 40], [50, 60, 70, 80]], "label": "cats"}',
        '[{"bbox_2d": [10, 20, 30, 40], "label": "a"}, {"bbox_2d": [50, 60, 70, 80], "label": "b"}]',
        '{"bbox_2d": [10, 20, 30, 40]}\n{"bbox_2d": [50, 60, 70, 80]}',
        "<ref>a</ref><box>[[10, 20, 30, 40]]</box> and <ref>b</ref><box>[[50, 60, 70, 80]]</box>",
        "(10, 20), (30, 40) and (50, 60), (70, 80)",
        "(10, 20), (30, 40), (50, 60), (70, 80)",
    ],
)
def test_two_boxes_are_read(text: str) -> None:
    assert find_numbers(text, (1, 1)) == [ONE, TWO]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10, 20, 30, 40",
        "[10, 20, 30]",
        "[10, 20, 30, 40, 50]",
        "[10, 20, 30, 40",
        "[10, 20, x, 40]",
        "[10, 20, , 30, 40]",
        "[10-20, 30, 40, 50]",
        "[1e1, 20, 30, 40]",
        "[nan, 20, 30, inf]",
        "(10, 20)",
        "(10, 20) to (30, 40)",
        "(10, 20), and (30, 40)",
        "(10, 20), [], (30, 40)",
        "[10, 20; 30, 40]",
        "[[[[[",
        "][",
    ],
)
def test_nothing_is_read(text: str) -> None:
    assert find_numbers(text, (1, 1)) == []


def test_signs_and_any_size_are_read() -> None:
    assert find_numbers(f"[-5, +20, {'9' * 400}, 40]", (1, 1)) == [(-5.0, 20.0, float("inf"), 40.0)]


def test_a_long_text_is_read_in_no_time() -> None:
    assert find_numbers("[(" * 100_000 + "[1, 2, 3, 4]" + "[1, " * 100_000, (1, 1)) == [(1.0, 2.0, 3.0, 4.0)]
