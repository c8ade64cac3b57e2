"""What holds for every convention, whichever are registered."""

import contextlib
from collections.abc import Sequence

import pytest

from moadapt.registry import CODECS, VIEWS
from moadapt_tasks.boxes import Box, BoxCodec, CannotWrite, View
from moadapt_tasks.boxes.views import CentreCrop, cut
from tests.tasks.boxes.drawing import SIZES, near, some_boxes

SIZE = (640, 480)
NAMES = CODECS.names()
every_codec = pytest.mark.parametrize("codec", [CODECS.get(name)() for name in NAMES], ids=NAMES)
every_view = pytest.mark.parametrize("view", [None, *(part() for _, part in VIEWS)], ids=["own", *VIEWS.names()])
"""A convention's own view, and every view there is."""


def with_view(codec: BoxCodec, view: View | None) -> BoxCodec:
    return codec if view is None else type(codec)(view=view)  # type: ignore[call-arg]


def assert_near(found: Box, wanted: Box, reach: tuple[float, float], where: object) -> None:
    for edge, again, most in zip(wanted, found, reach * 2, strict=True):
        assert abs(edge - again) <= most * (1 + 1e-9) + 1e-9, where


@every_codec
@every_view
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_boxes_come_back_within_half_a_step(codec: BoxCodec, view: View | None, size: tuple[int, int]) -> None:
    """In pixels of the picture: a step is the shown part's side, in those pixels, over the steps along it."""
    codec = with_view(codec, view)
    frame = codec.view.frame(size)
    step = [(frame.box[i + 2] - frame.box[i]) / count for i, count in enumerate(codec.steps(frame.size))]
    within = cut(frame.box, *size)
    # a box of two steps has area however it is rounded; one of a whole narrow picture may be less
    least = [min(2.001 * step[i], within[i + 2] - within[i]) for i in (0, 1)]
    boxes = some_boxes(within, (least[0], least[1]), 300)
    for start in range(0, len(boxes), 3):
        group = boxes[start : start + 1 + start % 3]
        try:
            text = codec.write(group, size, "cat")
        except CannotWrite:
            assert min(within[i + 2] - within[i] - 2 * step[i] for i in (0, 1)) < 0, "only where a picture is so narrow"
            continue
        found = codec.read(text, size)
        assert found is not None
        assert len(found) == len(group)
        for box, again in zip(group, found, strict=True):
            assert_near(again, box, (step[0] / 2, step[1] / 2), (text, box))


@every_codec
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_is_written_twice_is_the_same(codec: BoxCodec, size: tuple[int, int]) -> None:
    for box in some_boxes((0, 0, *size), (size[0] / 4, size[1] / 4), 50):
        try:
            text = codec.write([box], size, "cat")
        except CannotWrite:
            continue  # a side of a pixel or so
        read = codec.read(text, size)
        assert read is not None
        assert codec.read(codec.write(read, size, "cat"), size) == near(read)


@every_codec
def test_no_box_is_written_and_read_as_none(codec: BoxCodec) -> None:
    text = codec.write([], SIZE, "cat")
    assert text
    assert codec.read(text, SIZE) == []


@every_codec
@pytest.mark.parametrize("text", ["none", "None.", "There is none in the picture", "[]", "```json\n[ ]\n```", "NONE\n"])
def test_words_for_no_box_are_read_as_none(codec: BoxCodec, text: str) -> None:
    assert codec.read(text, SIZE) == []


@every_codec
@pytest.mark.parametrize("text", ["", "nowhere", "nonesuch", "a cat", "1, 2, 3, 4", "[1, 2, 3]", "<loc", "[", "{}"])
def test_a_text_without_boxes_is_not_read_as_none(codec: BoxCodec, text: str) -> None:
    assert codec.read(text, SIZE) is None


@every_codec
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "</s>"),
        ("Sure! Here it is:\n", "\nLet me know if you need more."),
        ("```json\n", "\n```"),
        ("```\n", "``"),
        ("  \n", " none of the others"),
        ("The 2 cats (left to right): ", "; the third [is hidden"),
    ],
)
def test_words_around_boxes_are_skipped(codec: BoxCodec, before: str, after: str) -> None:
    text = codec.write([(64, 48, 320, 240), (10, 20, 600, 400)], SIZE, "cat")
    assert codec.read(before + text + after, SIZE) == codec.read(text, SIZE)


@every_codec
def test_a_box_cut_short_leaves_those_before_it(codec: BoxCodec) -> None:
    one, two = (64.0, 48.0, 320.0, 240.0), (100.0, 200.0, 600.0, 400.0)
    text = codec.write([one, two], SIZE, "cat")
    whole = codec.read(text, SIZE)
    counts = [len(codec.read(text[:end], SIZE) or ()) for end in range(len(text) + 1)]
    assert whole is not None
    assert sorted(counts) == counts, "a longer text tells no fewer boxes"
    assert {0, 2} <= set(counts)
    for end, count in enumerate(counts):
        assert (codec.read(text[:end], SIZE) or [])[:count] == whole[:count], text[:end]


@every_codec
def test_a_box_is_cut_to_the_middle_that_is_seen(codec: BoxCodec) -> None:
    """Of 640 by 480 a centre crop shows 80 to 560; a step is at most the 15 pixels of a 32nd of those 480."""
    codec = with_view(codec, CentreCrop(shortest=240, crop=240))
    assert codec.view.frame(SIZE).box == (80, 0, 560, 480)
    found = codec.read(codec.write([(0, 100, 300, 400), (0, 0, 640, 480)], SIZE, "cat"), SIZE)
    assert found is not None
    assert_near(found[0], (80, 100, 300, 400), (7.5, 7.5), found)
    assert_near(found[1], (80, 0, 560, 480), (7.5, 7.5), found)


@every_codec
@pytest.mark.parametrize("box", [(0, 100, 80, 400), (0, 0, 20, 20), (560, 0, 640, 480), (100, 50, 100, 90)])
def test_a_box_that_is_not_seen_is_refused(codec: BoxCodec, box: Box) -> None:
    codec = with_view(codec, CentreCrop(shortest=240, crop=240))
    with pytest.raises(CannotWrite, match=r"nothing is seen, only 80 to 560 across and 0 to 480 down; leave it out"):
        codec.write([(100, 100, 200, 200), box], SIZE, "cat")


@every_codec
@pytest.mark.parametrize(
    "label", ["cat {asleep}", 'the man\'s "red" hat', "дитя", "a 2 & 3", "", "x" * 300, "left, right"]
)
def test_labels_leave_boxes_alone(codec: BoxCodec, label: str) -> None:
    boxes: Sequence[Box] = [(64, 48, 320, 240), (100, 200, 600, 400)]
    assert codec.read(codec.write(boxes, SIZE, label), SIZE) == codec.read(codec.write(boxes, SIZE, "cat"), SIZE)


@every_codec
@pytest.mark.parametrize(
    "label",
    ["[1, 2, 30, 40]", "<loc0001><loc0001><loc0900><loc0900>", "<loc_1><loc_1><loc_9><loc_9>", "a</box>", "a ; b"],
)
def test_a_label_that_would_be_misread_is_refused(codec: BoxCodec, label: str) -> None:
    """Either the label changes nothing about what is read, or it is refused."""
    plain = codec.read(codec.write([(64, 48, 320, 240)], SIZE, "cat"), SIZE)
    with contextlib.suppress(CannotWrite):
        assert codec.read(codec.write([(64, 48, 320, 240)], SIZE, label), SIZE) == plain
