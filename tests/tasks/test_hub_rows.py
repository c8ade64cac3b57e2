import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moadapt.registry import TASKS
from moadapt.task import Defect
from moadapt_tasks.hub_rows import HubRows

SIZE = (30, 20)


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = pytest.importorskip("datasets")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return found


def picture(color: str = "red") -> dict[str, Any]:
    held = io.BytesIO()
    Image.new("RGB", SIZE, color).save(held, "JPEG")
    return {"bytes": held.getvalue(), "path": "some.jpg"}


def task_on(folder: Path, **changes: Any) -> HubRows:
    return HubRows(**{"rows": f"{folder}/{{split}}-*.parquet", "images": ["{image}"], **changes})


def write(datasets: Any, folder: Path, rows: Sequence[dict[str, Any]], types: dict[str, Any], name: str = "0") -> None:
    features = datasets.Features(types)
    datasets.Dataset.from_list(list(rows), features=features).to_parquet(folder / f"train-{name}.parquet")


def rows_of(datasets: Any, folder: Path, rows: Sequence[dict[str, Any]], types: dict[str, Any], **changes: Any) -> Any:
    write(datasets, folder, rows, types)
    return task_on(folder, **changes).read("train")[0]


def test_datasets_is_registered() -> None:
    assert TASKS.get("datasets") is HubRows


def test_every_row_of_all_files_is_read(datasets: Any, tmp_path: Path) -> None:
    types = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    for file in range(2):
        rows = [{"image": picture(), "question": f"{file}{row}?", "answer": "a"} for row in range(3)]
        write(datasets, tmp_path, rows, types, str(file))
    rows, bad = task_on(tmp_path).read("train")
    assert (len(rows), bad) == (6, [])
    assert [row.prompt for row in rows] == ["00?", "01?", "02?", "10?", "11?", "12?"]
    assert rows[-1].prompt == rows[3:][2].prompt == "12?"
    assert rows[4].entry == f"{tmp_path}/train-*.parquet: row 4"
    [shown] = rows[4].pictures
    assert (shown.size, shown.open().size) == (SIZE, SIZE)
    with pytest.raises(IndexError):
        rows[6]


def test_fields_of_fields_and_labels_have_names(datasets: Any, tmp_path: Path) -> None:
    """VQA v2 as the hub has it, and pictures in a list."""
    types = {
        "image": datasets.List(datasets.Image()),
        "asked": {"text": datasets.Value("string"), "number": datasets.Value("int32")},
        "answers": datasets.List({"answer": datasets.Value("string"), "answer_id": datasets.Value("int32")}),
        "kind": datasets.ClassLabel(names=["animal", "plant"]),
        "kinds": datasets.List(datasets.ClassLabel(names=["wild", "tame"])),
    }
    row = {
        "image": [picture(), picture("blue")],
        "asked": {"text": "what is it?", "number": 3},
        "answers": [{"answer": "cat", "answer_id": 1}, {"answer": "a cat", "answer_id": 2}],
        "kind": 1,
        "kinds": [1, 0],
    }
    prompt = "{asked_number}. {asked_text}"
    [example] = rows_of(datasets, tmp_path, [row], types, prompt=prompt, answers="answers_answer")
    assert (example.prompt, example.answers) == ("3. what is it?", ("cat", "a cat"))
    assert len(example.pictures) == 2
    for answers, expected in (("kind", ("plant",)), ("kinds", ("tame", "wild"))):
        [example] = task_on(tmp_path, prompt=prompt, answers=answers).read("train")[0]
        assert example.answers == expected


def test_plain_bytes_are_pictures_and_null_is_none(datasets: Any, tmp_path: Path) -> None:
    types = {name: datasets.Value("string") for name in ("question", "answer")} | {"image": datasets.Value("binary")}
    rows = [{"image": image, "question": "q", "answer": "a"} for image in (picture()["bytes"], None)]
    found = rows_of(datasets, tmp_path, rows, types)
    assert [[each.size for each in row.pictures] for row in found] == [[SIZE], []]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": {"bytes": b"no picture", "path": None}}, "image is broken"),
        ({"image": {"bytes": None, "path": "/etc/passwd"}}, "its image is .*/etc/passwd.*; give an integer or a text"),
        ({"answer": None}, "its answer is None; give a text"),
        ({"answer": " "}, "its answer is empty"),
        ({"question": ""}, "its question is empty"),
    ],
)
def test_a_row_that_cannot_be_used_says_so_when_it_is_drawn(
    datasets: Any, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    types = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    good = {"image": picture(), "question": "q", "answer": "a"}
    rows = rows_of(datasets, tmp_path, [good | change, good], types)
    with pytest.raises(Defect, match=f"row 0: .*{reason}"):
        rows[0]
    assert rows[1].answers == ("a",)


def test_limit_takes_the_first_rows(datasets: Any, tmp_path: Path) -> None:
    types = {name: datasets.Value("string") for name in ("question", "answer")}
    rows = [{"question": str(row), "answer": "a"} for row in range(4)]
    assert [row.prompt for row in rows_of(datasets, tmp_path, rows, types, images=[], limit=2)] == ["0", "1"]


def test_a_data_set_of_a_hub_is_asked_for_its_split(
    datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": "q", "answer": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = HubRows(rows="somebody/data", config="small", revision="v1", splits={"validation": "val"})
    assert [row.answers for row in task.read("validation")[0]] == [("a",)]
    assert asked == [(("somebody/data", "small"), {"split": "val", "revision": "v1"})]


def test_what_cannot_be_read_says_what_to_give(datasets: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"test-\*\.parquet, split 'test', cannot be read: no such file; give"):
        task_on(tmp_path).read("test")
    (tmp_path / "train-0.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"train-\*\.parquet, split 'train', cannot be read"):
        task_on(tmp_path).read("train")


def test_files_have_no_revision() -> None:
    with pytest.raises(ValueError, match=r"leave out `config` and `revision`"):
        HubRows(rows="a.parquet", revision="v1")


def test_a_missing_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install moadapt\[hub\]"):
        task_on(tmp_path).read("train")
