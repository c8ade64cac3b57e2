import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moadapt.reporting.pictures import Outline, overlap, picture
from tests.reporting.parsed_page import ParsedPage


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([0, 0, 4, 4], [0, 0, 4, 4], 1.0),
        ([0, 0, 4, 4], [2, 0, 6, 4], 8 / (16 + 16 - 8)),
        ([0, 0, 4, 4], [4, 4, 8, 8], 0.0),
        ([0, 0, 0, 0], [0, 0, 0, 0], 0.0),
    ],
)
def test_overlap(first: list[float], second: list[float], expected: float) -> None:
    assert overlap(first, second) == pytest.approx(expected)


def test_a_small_picture_keeps_its_pixels_and_is_not_smoothed(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    page = ParsedPage(picture(tmp_path / "small.png", [], alt="noise"))
    image = page.all("image", "pixels")[0].attributes
    found = Image.open(io.BytesIO(base64.b64decode(image["href"].removeprefix("data:image/png;base64,"))))
    assert np.array_equal(np.asarray(found), pixels)
    assert (image["width"], image["height"]) == ("5", "7")


def test_a_large_picture_is_shrunk_and_its_boxes_keep_their_coordinates(tmp_path: Path) -> None:
    Image.new("RGB", (1200, 600)).save(tmp_path / "large.png")
    box = Outline([100, 50, 700, 500], "reference", "", None)
    page = ParsedPage(picture(tmp_path / "large.png", [box], alt="large"))
    image = page.all("image")[0].attributes
    found = Image.open(io.BytesIO(base64.b64decode(image["href"].removeprefix("data:image/png;base64,"))))
    assert found.size == (480, 240)
    assert page.all("svg")[0].attributes["viewbox"] == "0 0 1200 600"
    assert [rect.attributes["width"] for rect in page.all("rect")] == ["600", "600"]


@pytest.mark.parametrize("content", [None, b"not a picture"])
def test_a_picture_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "broken.png"
    if content is not None:
        file.write_bytes(content)
    assert "broken.png" in ParsedPage(picture(file, [], alt="")).all("div", "lost")[0].words
