from pathlib import Path
from typing import BinaryIO

import pytest
from PIL import Image

from moadapt.task import Defect
from moadapt_tasks.pictures import Pictures
from moadapt_tasks.records import Record
from tests.tasks.spoiled_folder import SIZE, Folder

ENTRY = Record(Path("some.json"), "id 1", {})


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_size_accepts_pictures_of_any_mode(folder: Folder, mode: str) -> None:
    assert Pictures().size(folder.picture("picture.png", mode), ENTRY) == SIZE


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.bmp", "a.webp"])
def test_size_refuses_a_truncated_picture(folder: Folder, name: str) -> None:
    path = folder.picture(name, size=(200, 150))
    assert Pictures().size(path, ENTRY) == (200, 150)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(Defect, match=rf"some.json: id 1: its picture .*{name} is broken"):
        Pictures().size(path, ENTRY)


def test_size_decodes_neither_jpeg_nor_png_nor_what_phones_write(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [folder.picture("a.png"), folder.picture("a.jpg"), folder.path / "phone.jpg"]
    both = [Image.new("RGB", SIZE, colour) for colour in ("red", "blue")]
    both[0].save(paths[2], "MPO", save_all=True, append_images=both[1:])
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda picture: pytest.fail("it was decoded"))
    assert [Pictures().size(path, ENTRY) for path in paths] == [SIZE] * 3


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_size_refuses_what_is_no_picture(folder: Folder, content: bytes) -> None:
    path = folder.path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(Defect, match="is broken"):
        Pictures().size(path, ENTRY)


def test_size_refuses_a_missing_picture_and_a_folder(folder: Folder) -> None:
    for path, what in ((folder.path / "gone.png", "does not exist"), (folder.path, "is a folder")):
        with pytest.raises(Defect, match=what):
            Pictures().size(path, ENTRY)


def test_size_accepts_a_jpeg_with_bytes_behind_its_end(folder: Folder) -> None:
    path = folder.picture("picture.jpg")
    path.write_bytes(path.read_bytes() + b"\0" * 20)
    assert Pictures().size(path, ENTRY) == SIZE


def test_size_does_not_rotate(folder: Folder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn right to view"
    Image.new("RGB", SIZE).save(folder.path / "turned.jpg", exif=exif)
    assert Pictures().size(folder.path / "turned.jpg", ENTRY) == SIZE


def test_size_opens_a_picture_once(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = folder.picture("picture.png"), []
    open_picture = Image.open

    def count(file: BinaryIO) -> Image.Image:
        opened.append(file.name)
        return open_picture(file)

    monkeypatch.setattr("moadapt_tasks.pictures.Image.open", count)
    pictures = Pictures()
    assert {pictures.size(path, ENTRY) for _ in range(5)} == {SIZE}
    assert opened == [str(path)]


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800"])
def test_size_refuses_names_that_no_file_can_have(folder: Folder, name: str) -> None:
    with pytest.raises(Defect, match="is broken"):
        Pictures().size(folder.path / name, ENTRY)
