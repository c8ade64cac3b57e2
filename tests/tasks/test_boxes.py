import random

import pytest

from moadapt_tasks.boxes import Box, BoxCodec, IntegerBoxes, LocationTokens


def some_boxes(count: int) -> list[tuple[Box, int, int]]:
    """Boxes of at least four pixels a side in pictures of 32 to 1000 pixels."""
    source = random.Random(3)
    boxes = []
    for _ in range(count):
        width, height = source.randint(32, 1000), source.randint(32, 1000)
        left, top = source.uniform(0, width - 4), source.uniform(0, height - 4)
        boxes.append(((left, top, source.uniform(left + 4, width), source.uniform(top + 4, height)), width, height))
    return boxes


def test_integer_boxes_write_thousandths_of_each_side() -> None:
    assert IntegerBoxes().write((0, 0, 56, 28), 56, 28) == "[0, 0, 999, 999]"
    assert IntegerBoxes().write((10, 10, 20, 20), 100, 50) == "[100, 200, 200, 400]"  # 99.9, 199.8, 199.8, 399.6


def test_location_tokens_write_top_before_left() -> None:
    assert LocationTokens().write((10, 20, 30, 40), 1024, 1024) == "<loc0020><loc0010><loc0040><loc0030>"


def test_location_tokens_stay_below_1024_at_the_far_edges() -> None:
    assert LocationTokens().write((0, 0, 56, 56), 56, 56) == "<loc0000><loc0000><loc1023><loc1023>"


@pytest.mark.parametrize(
    ("codec", "steps", "tolerance"),
    [(IntegerBoxes(), 999, 0.5), (LocationTokens(), 1024, 1.0)],  # the first rounds, the second may cut
)
def test_codec_reads_back_what_it_wrote(codec: BoxCodec, steps: int, tolerance: float) -> None:
    for box, width, height in some_boxes(500):
        found = codec.read(codec.write(box, width, height), width, height)
        assert found is not None
        for edge, again, side in zip(box, found, (width, height, width, height), strict=True):
            assert abs(edge - again) <= tolerance * side / steps + 1e-9
            assert 0 <= again <= side + 1e-9


def test_integer_boxes_read_the_first_box_of_a_text() -> None:
    found = IntegerBoxes().read("it is at [ 0,0, 999 ,999 ] or [1, 2, 3, 4]", 56, 28)
    assert found == pytest.approx((0, 0, 56, 28))


def test_location_tokens_read_the_first_box_of_a_text() -> None:
    found = LocationTokens().read(
        "<loc0256> <loc0000><loc0512><loc1023> cat ; <loc0001><loc0001><loc0009><loc0009>", 64, 32
    )
    assert found == pytest.approx((0, 8, 1023 / 1024 * 64, 16))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nowhere",
        "[1, 2, 3]",
        "[1, 2, 3, 4, 5]",
        "1, 2, 3, 4",
        "[-1, 2, 3, 4]",
        "[0.1, 0.2, 0.3, 0.4]",
        "[1, 2, 3, 1000]",
        "[30, 2, 3, 40]",  # right of itself
        "[3, 40, 30, 4]",  # below itself
        "[3, 4, 3, 40]",  # no width
    ],
)
def test_integer_boxes_read_nothing_from(text: str) -> None:
    assert IntegerBoxes().read(text, 100, 100) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2, 3, 4]",
        "<loc0001><loc0001><loc0009>",
        "<loc001><loc001><loc009><loc009>",
        "<loc0001><loc0001><loc0009><loc1024>",
        "<loc0001><loc0009><loc0009><loc0001>",  # right of itself
        "<loc0001><loc0001>, <loc0009><loc0009>",
    ],
)
def test_location_tokens_read_nothing_from(text: str) -> None:
    assert LocationTokens().read(text, 100, 100) is None
