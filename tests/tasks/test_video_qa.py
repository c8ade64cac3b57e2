import json
from pathlib import Path
from typing import Any

import pytest

from moadapt.registry import TASKS
from moadapt_tasks.video_qa import VideoQA
from tests.tasks.spoiled_folder import SIZE, Folder

Rows = list[dict[str, Any]]


def documents() -> Rows:
    def entry(qid: int, vid_name: str, moment: Any, question: str, right: int, *answers: str) -> dict[str, Any]:
        options = {f"a{number}": answer for number, answer in enumerate(answers)}
        about = {"qid": qid, "vid_name": vid_name, "ts": moment, "show_name": "The Big Bang Theory"}
        return about | options | {"q": question, "answer_idx": right}

    five = ("A man.", "A dog.", "Señor {X}.", "Nobody.", "Howard.")
    return [
        entry(122039, "s03e02_seg02_clip_10", "1-2.0", "Who is {there}?", 2, *five),
        entry(122040, "s03e02_seg02_clip_10", "3.2-3.3", "Who leaves?", 4, *five),
        entry(
            122041, "how2_7", [0.0, 1.0], "What is it?", 0, "A pan.", "A pot.", "A cup.", "A lid."
        ),  # How2QA has four
    ]


SUBTITLES: Rows = [
    {
        "vid_name": "s03e02_seg02_clip_10",
        "sub": [
            {"text": " Howard : Is it\n raw?", "start": 0.0, "end": 0.9},
            {"text": "Raj : No &gt; yes.", "start": 0.9, "end": 1.5},
            {"text": "", "start": 1.5, "end": 1.6},
            {"text": "Howard : ¡Sí!", "start": 2.0, "end": 3.0},
        ],
    },
    {"vid_name": "how2_7", "sub": []},
]


@pytest.fixture
def task(folder: Folder) -> VideoQA:
    for name, frames in (("s03e02_seg02_clip_10", 12), ("how2_7", 3)):
        (folder.path / name).mkdir()
        for number in range(frames):
            folder.picture(f"{name}/{number:05d}.jpg")
    return task_on(folder)


def task_on(folder: Folder, **changes: Any) -> VideoQA:
    files = {"questions": f"{folder.path}/tvqa_{{split}}.jsonl", "frames": f"{folder.path}/{{vid_name}}"}
    return VideoQA(**files | {"splits": {"validation": "val"}, "num_frames": 4} | changes)


def write(file: Path, rows: Rows) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_questions(folder: Folder, rows: Rows) -> None:
    write(folder.path / "tvqa_val.jsonl", rows)


def shown(example: Any) -> list[int]:
    return [int(picture.file.stem) for picture in example.pictures]


def test_video_qa_is_registered() -> None:
    assert TASKS.get("video_qa") is VideoQA


def test_read_shows_frames_of_whole_videos(folder: Folder, task: VideoQA) -> None:
    write_questions(folder, documents())
    examples, bad = task.read("validation")
    assert bad == []
    assert [shown(example) for example in examples] == [[1, 4, 7, 10], [1, 4, 7, 10], [0, 1, 2]]
    first = examples[0]
    assert {picture.size for picture in first.pictures} == {SIZE}
    assert first.prompt == (
        "Who is {there}?\nA. A man.\nB. A dog.\nC. Señor {X}.\nD. Nobody.\nE. Howard.\n"
        "Answer with the letter of an option."
    )
    assert first.answers == ("C",)
    assert first.reference == {"right": "C", "options": ["A man.", "A dog.", "Señor {X}.", "Nobody.", "Howard."]}
    assert first.entry == f"{folder.path}/tvqa_val.jsonl: line 1"
    assert examples[2].reference["options"] == ["A pan.", "A pot.", "A cup.", "A lid."]


def test_read_shows_and_quotes_moments(folder: Folder, task: VideoQA) -> None:
    write_questions(folder, documents())
    write(folder.path / "subtitles.jsonl", SUBTITLES)
    changed = task_on(
        folder,
        frames_per_second=3,
        subtitles=f"{folder.path}/subtitles.jsonl",
        prompt="{subtitles}|{question}|{options}",
    )
    examples, bad = changed.read("validation")
    assert bad == []
    assert [shown(example) for example in examples] == [[3, 4, 5, 6], [10], [0, 1, 2]]
    assert [example.prompt.split("|")[0] for example in examples] == ["Raj : No > yes. Howard : ¡Sí!", "", ""]


def test_read_quotes_whole_videos(folder: Folder, task: VideoQA) -> None:
    write_questions(folder, documents()[:1])
    write(folder.path / "subtitles.jsonl", SUBTITLES)
    changed = task_on(folder, subtitles=f"{folder.path}/subtitles.jsonl", prompt="{subtitles}|{options}", num_frames=1)
    examples, _ = changed.read("validation")
    assert examples[0].prompt.startswith("Howard : Is it raw? Raj : No > yes. Howard : ¡Sí!|")
    assert shown(examples[0]) == [6]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("q", "", "its q is empty"),
        ("a0", None, "its a0 is None; give a text"),
        ("a4", " ", "its a4 is empty"),
        ("answer_idx", 5, "its answer_idx is 5; give 0 to 4"),
        ("answer_idx", -1, "its answer_idx is -1"),
        ("answer_idx", "2", "its answer_idx is '2'"),
        ("answer_idx", True, "its answer_idx is True"),
        ("vid_name", "gone", "its video"),
        ("vid_name", None, "its vid_name is None"),
        ("ts", "nan-nan", "its ts is 'nan-nan'"),
        ("ts", "50-60", "its moment begins at 50 s, but its 12 frames end at 4 s"),
        ("qid", 122039, "its qid 122039 is that of an earlier entry"),
    ],
)
def test_read_reports_a_bad_question(folder: Folder, task: VideoQA, key: str, value: Any, reason: str) -> None:
    rows = documents()
    rows[1][key] = value
    write_questions(folder, rows)
    examples, bad = task_on(folder, frames_per_second=3).read("validation")
    assert [example.entry.rsplit(" ", 1)[1] for example in examples] == ["1", "3"]
    assert [(one.entry, one.reason[: len(reason)]) for one in bad] == [("line 2", reason)]


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("answer_idx", "it has no 'answer_idx'"),
        ("a1", "it has 1 answers to choose from"),
        ("a0", "it has 0 answers to choose from"),
    ],
)
def test_read_reports_a_question_that_lacks(folder: Folder, task: VideoQA, key: str, reason: str) -> None:
    rows = documents()
    del rows[1][key]
    write_questions(folder, rows)
    _, bad = task.read("validation")
    assert [(one.entry, one.reason.split(";")[0]) for one in bad] == [("line 2", reason)]


def test_read_reports_more_answers_than_letters(folder: Folder, task: VideoQA) -> None:
    rows = documents()
    rows[1] |= {f"a{number}": "So." for number in range(27)}
    write_questions(folder, rows)
    _, bad = task.read("validation")
    assert [one.reason for one in bad] == ["it has 27 answers to choose from; give 2 to 26"]


def test_read_reports_a_broken_frame_where_it_is_shown(folder: Folder, task: VideoQA) -> None:
    write_questions(folder, documents())
    (folder.path / "how2_7/00001.jpg").write_bytes(b"no picture")
    examples, bad = task.read("validation")
    assert (len(examples), [one.entry for one in bad]) == (2, ["line 3"])
    assert "00001.jpg is broken" in bad[0].reason
    examples, bad = task_on(folder, num_frames=2).read("validation")  # frames 0 and 2
    assert (len(examples), bad) == (3, [])


@pytest.mark.parametrize(
    ("spoil", "entry", "reason"),
    [
        (lambda rows: rows.pop(0), "line 1", "its vid_name 's03e02_seg02_clip_10' is unknown to"),
        (lambda rows: rows[0].update(sub="hello"), "line 1", "its sub is 'hello'; give a list"),
        (lambda rows: rows[0]["sub"][1].pop("text"), "line 1, sub[1]", "it has no 'text'"),
        (lambda rows: rows[0]["sub"][1].update(start="0.9"), "line 1, sub[1]", "its start is '0.9'; give a finite"),
    ],
)
def test_read_reports_bad_subtitles(folder: Folder, task: VideoQA, spoil: Any, entry: str, reason: str) -> None:
    write_questions(folder, [documents()[0], documents()[2]])
    rows = json.loads(json.dumps(SUBTITLES))
    spoil(rows)
    write(folder.path / "subtitles.jsonl", rows)
    told = {"subtitles": f"{folder.path}/subtitles.jsonl", "prompt": "{subtitles}{options}", "frames_per_second": 3}
    examples, bad = task_on(folder, **told).read("validation")
    assert [example.entry.rsplit(" ", 1)[1] for example in examples] == ["2"]
    assert [(one.entry, one.reason[: len(reason)]) for one in bad] == [(entry, reason)]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_frames": 0}, "`num_frames` is 0"),
        ({"frames_per_second": 0}, "`frames_per_second` is 0"),
        ({"frames": "frames"}, "`frames` is 'frames'"),
        ({"prompt": "{question}"}, "`prompt`"),
        ({"prompt": "{subtitles}{options}"}, "`subtitles` is None; give both or neither"),
        ({"subtitles": "subtitles.jsonl"}, "`subtitles` is 'subtitles.jsonl'; give both or neither"),
        ({"limit": 0}, "`limit` is 0"),
    ],
)
def test_video_qa_refuses(folder: Folder, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        task_on(folder, **changes)


def test_right_answers_score_one(folder: Folder, task: VideoQA) -> None:
    write_questions(folder, documents())
    examples, _ = task.read("validation")
    metric = task.metrics()[task.primary]
    written = [f"({examples[0].answers[0]})", "howard", f"The answer is {examples[2].answers[0]}."]
    metric.update(
        [task.parse(text, example) for text, example in zip(written, examples, strict=True)],
        [example.reference for example in examples],
    )
    assert metric.compute().item() == 1
