import io
import json
import os
import pickle
import tarfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moadapt.registry import TASKS
from moadapt.sampling import Proportional
from moadapt.task import Defect
from moadapt.training.batch import Batch
from moadapt.training.collate import Collator
from moadapt.training.loaders import Rows, TrainLoader
from moadapt.training.order import MixedOrder
from moadapt_tasks.webdataset import WebDataset
from tests.training import toy

SIZE = (30, 20)
Files = dict[str, bytes]


def picture(kind: str = "JPEG", color: str = "red") -> bytes:
    held = io.BytesIO()
    Image.new("RGB", SIZE, color).save(held, kind)
    return held.getvalue()


def document(**values: Any) -> bytes:
    return json.dumps(values).encode()


def pack(file: Path, files: Files, form: int = tarfile.PAX_FORMAT, mode: str = "w") -> None:
    with tarfile.open(file, mode, format=form) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def numbered(*numbers: int) -> Files:
    """Samples of a picture, a JSON object and a text."""
    found = {}
    for number in numbers:
        found[f"{number:06d}.jpg"] = picture()
        found[f"{number:06d}.json"] = document(question=f"which is {number}?", answer=[f"number {number}", str(number)])
        found[f"{number:06d}.txt"] = b" a text\n"
    return found


def task_on(folder: Path, **changes: Any) -> WebDataset:
    return WebDataset(**{"rows": f"{folder}/{{split}}-*.tar", "images": ["{jpg}"], **changes})


def only(folder: Path, files: Files, **changes: Any) -> Any:
    pack(folder / "train-0.tar", files)
    [example] = task_on(folder, **changes).read("train")[0]
    return example


def test_webdataset_is_registered() -> None:
    assert TASKS.get("webdataset") is WebDataset


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_sample_of_all_shards_is_a_row(tmp_path: Path, form: int) -> None:
    pack(tmp_path / "train-0.tar", numbered(0, 1, 2), form)
    pack(tmp_path / "train-1.tar", {}, form)
    pack(tmp_path / "train-2.tar", numbered(3), form)
    pack(tmp_path / "test-0.tar", numbered(9), form)
    rows, bad = task_on(tmp_path).read("train")
    assert (len(rows), bad) == (4, [])
    assert [row.prompt for row in rows] == [f"which is {number}?" for number in range(4)]
    assert rows[3].answers == ("number 3", "3")
    assert rows[3].reference == ["number 3", "3"]
    assert rows[3].entry == f"{tmp_path}/train-2.tar: sample '000003'"
    assert rows[-1] == rows[3]
    assert rows[1:3] == [rows[1], rows[2]]
    with pytest.raises(IndexError):
        rows[4]


def test_pictures_stay_in_their_shard(tmp_path: Path) -> None:
    shown = only(tmp_path, numbered(5)).pictures
    assert [(each.file, each.size) for each in shown] == [(tmp_path / "train-0.tar" / "000005.jpg", SIZE)]
    assert shown[0].open().getpixel((1, 1))[0] > 200
    assert sorted(file.name for file in tmp_path.iterdir()) == ["train-0.tar", "train-0.tar.index"]


def test_settings_name_the_files(tmp_path: Path) -> None:
    files = {
        "a/b/x.left.png": picture("PNG"),
        "a/b/x.right.PNG": picture("PNG", "blue"),
        "a/b/x.question.txt": b"what differs?",
        "a/b/x.cls": b"7\n",
    }
    changes = {"images": ["{left_png}", "{right_png}"], "prompt": "{question_txt} Say it.", "answers": "cls"}
    example = only(tmp_path, files, **changes)
    assert (example.prompt, example.answers) == ("what differs? Say it.", ("7",))
    assert [each.open().getpixel((0, 0)) for each in example.pictures] == [(255, 0, 0), (0, 0, 255)]


def test_long_and_odd_names_are_labels_only(tmp_path: Path) -> None:
    names = ["../../etc/passwd", "/absolute", "x" * 300, "ünïcode", "with space"]
    files = {f"{name}.{end}": data for name in names for end, data in (("json", document(question="q", answer=name)),)}
    pack(tmp_path / "train-0.tar", files)
    rows, _ = task_on(tmp_path, images=[]).read("train")
    assert [row.answers[0] for row in rows] == names
    assert sorted(file.name for file in tmp_path.iterdir()) == ["train-0.tar", "train-0.tar.index"]


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("0.jpg", tarfile.SYMTYPE), ("pipe.txt", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        data = document(question="q", answer="a")
        info = tarfile.TarInfo("0.json")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    rows, _ = task_on(tmp_path, images=[]).read("train")
    assert [row.answers for row in rows] == [("a",)]


class Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize("ending", ["pyd", "pickle", "pkl", "pth", "npy"])
def test_pickles_are_never_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"0.json": document(question="q"), f"0.{ending}": pickle.dumps(Trap())}
    with pytest.raises(Defect, match=f"it has no '{ending}'; it has: question"):
        only(tmp_path, files, images=[], answers=ending)
    assert not Path("trapped").exists()


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"0.jpg": b"no picture", "0.json": document(question="q", answer="a")}, "0.jpg is broken"),
        ({"0.jpg": picture()[:-2], "0.json": document(question="q", answer="a")}, "its end is missing"),
        ({"0.json": document(question="q", answer="a")}, "it has no 'jpg'"),
        ({"0.jpg": picture(), "0.json": document(question="q")}, "it has no 'answer'"),
        ({"0.jpg": picture(), "0.json": b"{"}, "its json file is no JSON"),
        ({"0.jpg": picture(), "0.json": b"[" * 100_000}, "its json file is no JSON"),
        ({"0.jpg": picture(), "0.json": document(jpg="x", question="q", answer="a")}, "what jpg is"),
        ({"0.jpg": picture(), "0.txt": b"\xff"}, "its txt file is no UTF-8 text"),
    ],
)
def test_a_sample_that_cannot_be_used_says_so_when_it_is_drawn(tmp_path: Path, files: Files, reason: str) -> None:
    pack(tmp_path / "train-0.tar", files | numbered(1))
    rows, _ = task_on(tmp_path).read("train")
    with pytest.raises(Defect, match=reason) as found:
        rows[0]
    assert str(found.value).startswith(f"{tmp_path}/train-0.tar: sample '0': ")
    assert rows[1].answers == ("number 1", "1")


def test_a_picture_fills_no_other_pattern(tmp_path: Path) -> None:
    with pytest.raises(Defect, match=r"'/etc/\{jpg\}'.*give its field alone"):
        only(tmp_path, numbered(1), images=["/etc/{jpg}"])


def test_limit_takes_the_first_samples(tmp_path: Path) -> None:
    pack(tmp_path / "train-0.tar", numbered(0, 1, 2))
    assert [row.prompt for row in task_on(tmp_path, limit=2).read("train")[0]] == ["which is 0?", "which is 1?"]
    assert len(task_on(tmp_path, limit=9).read("train")[0]) == 3


def test_the_index_is_made_anew_when_the_shard_changed(tmp_path: Path) -> None:
    for numbers in ((0, 1), (2, 3, 4)):
        pack(tmp_path / "train-0.tar", numbered(*numbers))
        rows, _ = task_on(tmp_path).read("train")
        assert [row.prompt for row in rows] == [f"which is {number}?" for number in numbers]


def test_the_index_is_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(tmp_path / "train-0.tar", numbered(0, 1))
    first = list(task_on(tmp_path).read("train")[0])
    monkeypatch.setattr("moadapt_tasks.tar_index._starts", None)
    assert list(task_on(tmp_path).read("train")[0]) == first


def test_a_folder_that_cannot_be_written_to_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr("moadapt_tasks.tar_index.save_file", refuse)
    pack(tmp_path / "train-0.tar", numbered(0))
    assert len(task_on(tmp_path).read("train")[0]) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["train-0.tar"]


def test_a_broken_index_is_refused(tmp_path: Path) -> None:
    pack(tmp_path / "train-0.tar", numbered(0))
    (tmp_path / "train-0.tar.index").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=r"train-0\.tar\.index is broken.*delete it"):
        task_on(tmp_path).read("train")


@pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
def test_compressed_shards_are_refused(tmp_path: Path, mode: str) -> None:
    pack(tmp_path / "train-0.tar", numbered(0), mode=mode)
    with pytest.raises(ValueError, match="give whole, uncompressed tar files"):
        task_on(tmp_path).read("train")


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    pack(tmp_path / "train-0.tar", {"0.txt": b"x" * 5000})
    whole = (tmp_path / "train-0.tar").read_bytes()
    (tmp_path / "train-0.tar").write_bytes(whole[:3000])
    with pytest.raises(ValueError, match=r"train-0\.tar cannot be read"):
        task_on(tmp_path).read("train")


def test_no_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file is called .*validation-\*\.tar"):
        task_on(tmp_path).read("validation")


def loader(folder: Path, workers: int = 0, process: int = 0, processes: int = 1) -> TrainLoader:
    rows = Rows({"tars": task_on(folder).read("train")[0]})
    order = MixedOrder(rows.sizes, 6, Proportional(), seed=2)
    return TrainLoader(rows, order, Collator(toy.processor(), seed=2, answers=True), workers, process, processes)


def drawn(batches: Iterable[Batch]) -> list[list[str]]:
    return [[example.prompt for example in batch.examples] for batch in batches]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Of 13, 1 and 9 samples: an epoch is three steps of six, and leaves five for the next."""
    for shard, numbers in enumerate((range(13), range(13, 14), range(14, 23))):
        pack(tmp_path / f"train-{shard}.tar", numbered(*numbers))
    return tmp_path


@pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 3), (2, 0), (2, 2), (3, 1)])
def test_processes_and_workers_share_shards_without_overlap_or_loss(shards: Path, processes: int, workers: int) -> None:
    loaders = [loader(shards, workers, process, processes) for process in range(processes)]
    epochs = [[prompt for own in loaders for batch in drawn(own) for prompt in batch] for _ in range(2)]
    assert len(set(epochs[0])) == len(epochs[0]) == 18
    assert set(epochs[0]) | set(epochs[1]) == {f"which is {number}?" for number in range(23)}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("done", [1, 2, 4])
def test_a_run_resumed_within_an_epoch_draws_the_same_rows(shards: Path, done: int, workers: int) -> None:
    whole = loader(shards)
    expected = [batch for _ in range(3) for batch in drawn(whole)]
    stopped = loader(shards, workers)
    batches = (batch for _ in range(2) for batch in stopped)
    assert drawn(islice(batches, done)) == expected[:done]
    resumed = loader(shards, workers)
    resumed.load_state_dict(stopped.state_dict())
    assert [batch for _ in range(3) for batch in drawn(resumed)][: 9 - done] == expected[done:]
