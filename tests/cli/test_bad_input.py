"""What is wrong with files or settings is one message with status 2, before anything is trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.cli.conftest import Moadapt

SIZE = (16, 16)
Spoil = Callable[[Path], object]


def write_files(folder: Path) -> None:
    """Write two pictures with a question, a caption and an expression each, in the public forms."""
    (folder / "images").mkdir(parents=True)
    for number in range(2):
        Image.effect_noise(SIZE, 50).convert("RGB").save(folder / "images" / f"{number}.png")
    both = range(2)
    images = [{"id": i, "file_name": f"{i}.png", "width": SIZE[0], "height": SIZE[1]} for i in both]
    answers = [{"answer": "yes"}]
    documents = {
        "questions": {"questions": [{"question_id": i, "image_id": i, "question": "red?"} for i in both]},
        "annotations": {"annotations": [{"question_id": i, "image_id": i, "answers": answers} for i in both]},
        "captions": {
            "images": images,
            "annotations": [{"id": i, "image_id": i, "caption": "a red thing"} for i in both],
        },
        "instances": {
            "images": images,
            "annotations": [{"id": i, "image_id": i, "bbox": [2, 2, 10, 10]} for i in both],
        },
        "refs": [
            {"ref_id": i, "ann_id": i, "image_id": i, "split": "train", "sentences": [{"sent_id": i, "sent": "it"}]}
            for i in both
        ],
    }
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))


@pytest.fixture
def files(tmp_path: Path, config: dict[str, Any]) -> Path:
    """Folder of the files that the configuration now names for its three tasks."""
    for split in ("train", "validation"):
        write_files(tmp_path / split)
    (tmp_path / "validation" / "refs.json").write_text(
        (tmp_path / "train" / "refs.json").read_text().replace('"train"', '"validation"')
    )
    folder = f"{tmp_path}/{{split}}"
    pictures = {"images": f"{folder}/images/{{image_id}}.png"}
    settings = {
        "vqa": {"questions": f"{folder}/questions.json", "annotations": f"{folder}/annotations.json"},
        "captioning": {"captions": f"{folder}/captions.json"},
        "grounding": {
            "refs": f"{folder}/refs.json",
            "instances": f"{folder}/instances.json",
            "codec": {"class_path": "paligemma", "init_args": {"view": "padded_square"}},
        },
    }
    config["data"]["tasks"] = {
        name: {"class_path": name, "init_args": {**given, **pictures}} for name, given in settings.items()
    }
    config["model"]["experts"] = dict.fromkeys(settings, "lora")
    config["trainer"].update(max_steps=1, limit_val_batches=0)
    return tmp_path / "train"


def change(name: str, edit: Callable[[Any], object]) -> Spoil:
    """Return what edits a document."""

    def spoil(folder: Path) -> None:
        file = folder / f"{name}.json"
        document = json.loads(file.read_text())
        edit(document)
        file.write_text(json.dumps(document))

    return spoil


def truncate(folder: Path) -> None:
    file = folder / "images" / "1.png"
    file.write_bytes(file.read_bytes()[:200])


def make_folder(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()


@pytest.mark.parametrize(
    ("spoil", "count", "told"),
    [
        (lambda f: (f / "images" / "1.png").unlink(), 3, "questions.json: question_id 1: its picture"),
        (lambda f: make_folder(f, "images/1.png"), 3, "images/1.png is a folder"),
        (truncate, 3, "images/1.png is broken"),
        (change("questions", lambda d: d["questions"][1].pop("question")), 1, "question_id 1: it has no 'question'"),
        (
            change("annotations", lambda d: d["annotations"][0]["answers"].append({"answer": " "})),
            1,
            "annotations.json: question_id 0, answers[1]: its answer is empty",
        ),
        (
            change("captions", lambda d: d["annotations"].append({"id": 2, "image_id": 7, "caption": "x"})),
            1,
            "captions.json: annotations id 2: its image_id 7 is unknown",
        ),
        (
            change("instances", lambda d: d["annotations"][1].update(bbox=[9, 9, 90, 9])),
            1,
            "instances.json: annotations id 1: its bbox spans 9 to 99",
        ),
        (change("refs", lambda d: d.append(d[0])), 1, "refs.json: ref_id 0: its ref_id 0 is that of an earlier entry"),
    ],
    ids=["missing", "folder", "truncated", "no-key", "empty-answer", "unknown-image", "box-outside", "twice"],
)
def test_bad_entries_are_refused_or_skipped(
    moadapt: Moadapt,
    files: Path,
    tmp_path: Path,
    spoil: Spoil,
    count: int,
    told: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoil(files)
    counted = f"{count} entries cannot be used" if count > 1 else "1 entry cannot be used"
    assert moadapt("fit") == 2
    said = capsys.readouterr().err
    assert f"moadapt fit: {counted}:" in said
    assert told in said
    assert not (tmp_path / "run" / "last.ckpt").exists()
    assert moadapt("fit", "--data.on_bad_example", "skip") == 0
    assert f"{counted}; skipped:" in caplog.text
    assert told in caplog.text


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: (f / "refs.json").write_text("[{]"), "refs.json is no JSON: "),
        (lambda f: (f / "refs.json").write_text("[" * 100_000), "refs.json is nested too deeply"),
        (lambda f: (f / "captions.json").unlink(), "captions.json does not exist"),
        (lambda f: make_folder(f, "captions.json"), "captions.json is a folder"),
        (change("questions", lambda d: d.update(questions=[])), "questions.json: its 'questions' is an empty list"),
        (change("refs", lambda d: [r.update(split="val") for r in d]), "refs.json: no entry is of split 'train'"),
    ],
    ids=["broken", "deep", "missing", "folder", "empty", "other-split"],
)
def test_a_file_that_cannot_be_read_is_refused(
    moadapt: Moadapt, files: Path, spoil: Spoil, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(files)
    assert moadapt("fit", "--data.on_bad_example", "skip") == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "value", "told"),
    [
        ("data.batch_size", "many", 'Parser key "data.batch_size":\n  Expected a <class \'int\'>. Got value: many\n'),
        ("data.batch_size", 0, "batch_size is 0; give at least 1"),
        ("data.tasks.vqa.init_args.prompt", "{answer}", "`prompt` is '{answer}'; give a template of {question}"),
        ("data.tasks.vqa.class_path", "vqaa", "no task is called 'vqaa'; did you mean vqa?"),
        ("data.tasks.vqa.init_args.image", "x", "tasks.vqa (vqa) has no setting 'image'; did you mean images?"),
        ("model.shared", {"class_path": "lora", "init_args": {"rank": 0}}, "fit: LoRA got rank=0, dropout=0.0; need"),
        ("model.shared", {"class_path": "lora", "init_args": {"rank": "four"}}, "Got value: four"),
        ("model.experts", ["lora"], 'Parser key "model.experts"'),
        ("model", ["lora"], "model is ['lora']; give its settings, each as KEY: VALUE"),
        ("model.dtype", "float31", "dtype is 'float31'; give auto, or a number type of torch"),
        ("model.base", "/no/where", "the base '/no/where' cannot be loaded; give a folder, a hub name, or one of"),
        ("modl.base", "x", "does not accept option 'modl.base'"),
        ("trainer.accelerator", "cpuu", "invalid accelerator name"),
        ("seed_everything", -3, "-3 is not in bounds"),
        ("ckpt_path", "gone.ckpt", "ckpt_path is gone.ckpt, which is no file"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_in_a_few_lines(
    moadapt: Moadapt,
    config: dict[str, Any],
    files: Path,
    keys: str,
    value: Any,
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    *path, last = keys.split(".")
    section = config
    for key in path:
        section = section.setdefault(key, {})
    section[last] = value
    assert moadapt("fit") == 2
    said = capsys.readouterr().err
    assert said.startswith("moadapt fit: ")
    assert told in said
    assert len(said.splitlines()) < 8


def test_experts_that_bear_no_tasks_name_are_refused_where_the_router_goes_by_task(
    moadapt: Moadapt, config: dict[str, Any], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config["model"]["router"] = "by_task"
    config["model"]["experts"] = dict.fromkeys(["vqa", "captioning", "boxes"], "lora")
    assert moadapt("fit") == 2
    told = capsys.readouterr().err
    assert "tasks that it does not know: grounding; tasks that the data lacks: boxes" in told
    assert "The data has the tasks vqa, captioning, grounding" in told
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_yaml_that_cannot_be_parsed_is_told_with_file_and_line(
    moadapt: Moadapt, config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("model:\n\tbase: x\n")
    assert moadapt("fit", "-c", str(file)) == 2
    said = capsys.readouterr().err
    assert "found character '\\t'" in said
    assert "broken.yaml, line 2, column 1" in said


def test_a_file_in_the_place_of_the_runs_folder_is_refused(
    moadapt: Moadapt, config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("")
    assert moadapt("fit") == 2
    assert "run, a file; give a folder" in capsys.readouterr().err
