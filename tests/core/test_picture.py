from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from moadapt.picture import Picture


def encoded(image: Image.Image, form: str) -> bytes:
    file = BytesIO()
    image.save(file, format=form)
    return file.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_picture_is_opened_as_rgb(tmp_path: Path, form: str) -> None:
    data = encoded(Image.new("L", (3, 2), 128), form)
    file = tmp_path / "grey"
    file.write_bytes(data)
    for picture in (Picture(file, (3, 2)), Picture(Path("shard.tar/grey"), (3, 2), data)):
        opened = picture.open()
        assert (opened.mode, opened.size, opened.getpixel((1, 1))) == ("RGB", (3, 2), (128, 128, 128))


def test_what_is_transparent_becomes_white() -> None:
    seen = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    seen.putpixel((1, 0), (0, 0, 0, 0))
    opened = Picture(Path("made"), (2, 1), encoded(seen, "PNG")).open()
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(200, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\nnonsense"])
def test_what_cannot_be_read_is_named(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"shard\.tar/7\.png"):
        Picture(Path("shard.tar/7.png"), (1, 1), data).open()
