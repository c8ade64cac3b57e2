import json
from typing import Any

import pytest

from moadapt.registry import TASKS
from moadapt_tasks.video_captioning import VideoCaptioning
from tests.tasks.spoiled_folder import Folder

Rows = list[dict[str, Any]]


def documents() -> Rows:
    def entry(clip_id: int, vid_name: str, moment: Any, *captions: str) -> dict[str, Any]:
        descs = [
            {"desc": text, "desc_id": clip_id * 10 + k, "type": "v", "from_retrieval": True}
            for k, text in enumerate(captions)
        ]
        return {"vid_name": vid_name, "duration": 4.0, "ts": moment, "descs": descs, "clip_id": clip_id}

    return [
        entry(86602, "grey_s03e12_seg02_clip_17", [1.0, 2.0], "Meredith {walks} in. ", "A woman enters."),
        entry(86603, "grey_s03e12_seg02_clip_17", [3.0, 4.0], "She sits down."),
        entry(1, "iuQjb1-WAzs_0", [0.0, 1.0], "pick the ends off the crêpe"),
    ]


@pytest.fixture
def task(folder: Folder) -> VideoCaptioning:
    for name, frames in (("grey_s03e12_seg02_clip_17", 12), ("iuQjb1-WAzs_0", 5)):
        (folder.path / name).mkdir()
        for number in range(frames):
            folder.picture(f"{name}/{number:05d}.jpg")
    return task_on(folder)


def task_on(folder: Folder, **changes: Any) -> VideoCaptioning:
    files = {"captions": f"{folder.path}/tvc_{{split}}_release.jsonl", "frames": f"{folder.path}/{{vid_name}}"}
    return VideoCaptioning(**files | {"splits": {"validation": "val"}, "num_frames": 2} | changes)


def write(folder: Folder, rows: Rows, name: str = "tvc_val_release.jsonl") -> None:
    (folder.path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_video_captioning_is_registered() -> None:
    assert TASKS.get("video_captioning") is VideoCaptioning


@pytest.mark.parametrize(("rate", "expected"), [(None, [[3, 9], [3, 9], [1, 3]]), (3, [[4, 6], [9, 11], [1, 3]])])
def test_read_returns_one_row_a_clip(
    folder: Folder, task: VideoCaptioning, rate: float | None, expected: list[list[int]]
) -> None:
    write(folder, documents())
    examples, bad = task_on(folder, frames_per_second=rate).read("validation")
    assert bad == []
    shown = [[int(picture.file.stem) for picture in example.pictures] for example in examples]
    assert shown == expected
    assert examples[0].prompt == "describe the video"
    assert examples[0].answers == ("Meredith {walks} in.", "A woman enters.")
    assert examples[0].reference == list(examples[0].answers)
    assert examples[2].entry == f"{folder.path}/tvc_val_release.jsonl: line 3"


def test_read_quotes_subtitles(folder: Folder, task: VideoCaptioning) -> None:
    write(folder, documents()[:1])
    lines = [{"text": "Meredith : Hi.", "start": 0.5, "end": 1.5}, {"text": "Bye.", "start": 3, "end": 4}]
    write(folder, [{"vid_name": "grey_s03e12_seg02_clip_17", "sub": lines}], "tv_subtitles.jsonl")
    told = {"subtitles": f"{folder.path}/tv_subtitles.jsonl", "prompt": "They say: {subtitles}", "frames_per_second": 3}
    examples, bad = task_on(folder, **told).read("validation")
    assert ([example.prompt for example in examples], bad) == (["They say: Meredith : Hi."], [])


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("descs", [], "its descs is []; give a list with at least one object"),
        ("descs", ["She sits."], "it is 'She sits.'; give a JSON object"),
        ("vid_name", "gone", "its video"),
        ("vid_name", 7.5, "its vid_name is 7.5"),
        ("ts", [9, 10], "its moment begins at 9 s"),
        ("ts", None, "its ts is None"),
        ("clip_id", 86602, "its clip_id 86602 is that of an earlier entry"),
        ("clip_id", None, "its clip_id is None"),
    ],
)
def test_read_reports_a_bad_clip(folder: Folder, task: VideoCaptioning, key: str, value: Any, reason: str) -> None:
    rows = documents()
    rows[1][key] = value
    write(folder, rows)
    examples, bad = task_on(folder, frames_per_second=3).read("validation")
    assert [example.entry.rsplit(" ", 1)[1] for example in examples] == ["1", "3"]
    assert [(one.entry.split(",")[0], one.reason[: len(reason)]) for one in bad] == [("line 2", reason)]


def test_read_leaves_out_a_bad_caption_and_a_clip_without_any(folder: Folder, task: VideoCaptioning) -> None:
    rows = documents()
    rows[0]["descs"][0]["desc"] = " "
    rows[1]["descs"][0]["desc"] = 3
    write(folder, rows)
    examples, bad = task.read("validation")
    assert [example.answers for example in examples] == [("A woman enters.",), ("pick the ends off the crêpe",)]
    assert [(one.entry, one.reason.split(";")[0]) for one in bad] == [
        ("line 1, desc_id 866020", "its desc is empty"),
        ("line 2, desc_id 866030", "its desc is 3"),
        ("line 2", "none of its descs is usable"),
    ]


def test_read_reports_all_clips_of_a_split_without_descriptions(folder: Folder, task: VideoCaptioning) -> None:
    write(folder, [{key: value for key, value in row.items() if key != "descs"} for row in documents()])
    examples, bad = task.read("validation")
    assert examples == []
    assert [one.reason.split(";")[0] for one in bad] == ["it has no 'descs'"] * 3


def test_metrics_score_a_reference_as_perfect(folder: Folder, task: VideoCaptioning) -> None:
    write(folder, documents())
    examples, _ = task.read("validation")
    metric = task.metrics()["rouge_l"]
    written = [task.parse(f"{example.answers[0]}\n", example) for example in examples]
    metric.update(written, [example.reference for example in examples])
    assert task.primary in task.metrics()
    assert metric.compute().item() == pytest.approx(1)
