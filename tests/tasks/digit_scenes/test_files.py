import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moadapt_tasks.digit_scenes import files
from moadapt_tasks.digit_scenes.captions import captions
from moadapt_tasks.digit_scenes.files import SplitSettings, write_split
from moadapt_tasks.digit_scenes.scenes import draw_scene

SETTINGS = SplitSettings("validation", scenes=8, questions=4, expressions=3, seed=0)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_write_split_writes_the_public_formats(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "validation"
    assert write_split(folder, SETTINGS)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("images", "manifest.json", "questions.json", "annotations.json"),
        *("captions.json", "refs.json", "instances.json"),
    }
    questions, annotations = (
        read(folder, "questions.json")["questions"],
        read(folder, "annotations.json")["annotations"],
    )
    assert [one["question_id"] for one in questions] == [one["question_id"] for one in annotations]
    assert all(len(one["answers"]) == 10 for one in annotations)
    assert {tuple(sorted(answer)) for one in annotations for answer in one["answers"]} == {
        ("answer", "answer_confidence", "answer_id")
    }
    assert Counter(one["image_id"] for one in read(folder, "captions.json")["annotations"]) == dict.fromkeys(
        range(8), 5
    )
    assert sum(len(ref["sentences"]) for ref in read(folder, "refs.json")) == 8 * 3
    assert [category["name"] for category in read(folder, "instances.json")["categories"]] == list("0123456789")
    assert [path.name for path in tmp_path.joinpath("deep").iterdir()] == ["validation"]  # nothing is left aside


def test_written_scenes_are_those_that_were_drawn(tmp_path: Path) -> None:
    write_split(tmp_path / "validation", SETTINGS)
    instances = read(tmp_path / "validation", "instances.json")
    written = read(tmp_path / "validation", "captions.json")["annotations"]
    for image in instances["images"]:
        scene = draw_scene("validation", image["id"], 1000)
        pixels = np.asarray(Image.open(tmp_path / "validation" / "images" / image["file_name"]))
        assert np.array_equal(pixels, scene.pixels)
        assert (image["width"], image["height"]) == pixels.shape[1::-1]
        boxes = [
            (one["category_id"], one["bbox"]) for one in instances["annotations"] if one["image_id"] == image["id"]
        ]
        assert boxes == [
            (t.digit, [t.box[0], t.box[1], t.box[2] - t.box[0], t.box[3] - t.box[1]]) for t in scene.objects
        ]
        assert [one["caption"] for one in written if one["image_id"] == image["id"]] == captions(scene)


def test_write_split_depends_on_its_settings_only(tmp_path: Path) -> None:
    for name, settings in (("a", SETTINGS), ("b", SETTINGS), ("c", replace(SETTINGS, seed=1))):
        write_split(tmp_path / name, settings)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    differing = {name for name, data in content(tmp_path / "a").items() if content(tmp_path / "c").get(name) != data}
    assert differing == set(content(tmp_path / "a"))


def test_fewer_scenes_are_the_first_of_more(tmp_path: Path) -> None:
    write_split(tmp_path / "more", SETTINGS)
    write_split(tmp_path / "fewer", replace(SETTINGS, scenes=3))
    more = read(tmp_path / "more", "questions.json")["questions"]
    fewer = read(tmp_path / "fewer", "questions.json")["questions"]
    assert fewer == more[: len(fewer)]


def test_write_split_reuses_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_split(tmp_path / "validation", SETTINGS)
    monkeypatch.setattr(files, "draw_scene", None)  # whoever draws now, fails
    assert not write_split(tmp_path / "validation", SETTINGS)


@pytest.mark.parametrize(
    "change", [{"scenes": 4}, {"questions": 2}, {"expressions": 1}, {"seed": 9}, {"split": "test"}]
)
def test_write_split_replaces_what_other_settings_made(tmp_path: Path, change: dict[str, Any]) -> None:
    folder, settings = tmp_path / "validation", replace(SETTINGS, **change)
    write_split(folder, SETTINGS)
    assert write_split(folder, settings)
    write_split(tmp_path / "fresh", settings)
    assert content(folder) == content(tmp_path / "fresh")


def test_write_split_replaces_what_an_older_version_made(tmp_path: Path) -> None:
    write_split(tmp_path / "validation", SETTINGS)
    manifest = read(tmp_path / "validation", "manifest.json")
    (tmp_path / "validation" / "manifest.json").write_text(json.dumps(manifest | {"version": 0}))
    assert write_split(tmp_path / "validation", SETTINGS)
    assert read(tmp_path / "validation", "manifest.json") == manifest


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_split(tmp_path / "validation", SETTINGS)
    before = content(tmp_path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files, "_refs", fail)
    with pytest.raises(OSError, match="disk full"):
        write_split(tmp_path / "validation", replace(SETTINGS, seed=1))
    assert content(tmp_path) == before


@pytest.mark.parametrize("manifest", [None, "[]", '{"writer": "somebody"}'])
def test_write_split_refuses_a_folder_that_it_did_not_write(tmp_path: Path, manifest: str | None) -> None:
    tmp_path.joinpath("thesis.txt").write_text("years of work")
    if manifest is not None:
        tmp_path.joinpath("manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match="holds files that are no digit scenes; choose another root"):
        write_split(tmp_path, SETTINGS)
    assert tmp_path.joinpath("thesis.txt").read_text() == "years of work"
