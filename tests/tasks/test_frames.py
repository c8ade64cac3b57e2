from pathlib import Path
from typing import Any

import pytest

from moadapt_tasks.frames import FrameFolders, evenly, moment_of, within
from moadapt_tasks.records import Defect, Record
from tests.tasks.spoiled_folder import Folder


def record(**values: Any) -> Record:
    return Record(Path("some.jsonl"), "line 1", values)


@pytest.mark.parametrize("total", [1, 2, 7, 8, 9, 100, 101])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_evenly_takes_the_middles_of_equal_stretches(total: int, count: int) -> None:
    found = evenly(range(total), count)
    if total <= count:
        assert found == list(range(total))
    else:
        assert found == [int((index + 0.5) * total / count) for index in range(count)]
        assert len(set(found)) == count


@pytest.mark.parametrize(
    ("moment", "rate", "expected"),
    [
        ((0, 3), 3, range(10)),  # frame k is that of second k / 3
        ((1, 2), 3, range(3, 7)),
        ((1.1, 1.3), 3, [4]),  # no frame lies within; the one at 1.33 is nearest to 1.2
        ((2.9, 60), 3, [9]),
        ((3.9, 5), 3, [9]),  # begins up to a second behind the last frame
        ((0, 0), 0.5, [0]),
    ],
)
def test_within_gives_the_frames_of_a_moment(moment: tuple[float, float], rate: float, expected: Any) -> None:
    assert list(within(range(10), moment, rate, record())) == list(expected)


def test_within_refuses_a_moment_after_the_end() -> None:
    with pytest.raises(Defect, match=r"begins at 5 s, but its 10 frames end at 3.33333 s; correct it or `frames_per"):
        within(range(10), (5, 6), 3, record())


@pytest.mark.parametrize(
    ("written", "expected"),
    [("20.16-25.12", (20.16, 25.12)), (" 3 - 4. ", (3, 4)), ([35.73, 40.9], (35.73, 40.9)), ([0, 0], (0, 0))],
)
def test_moment_of_reads_both_forms(written: Any, expected: tuple[float, float]) -> None:
    assert moment_of(record(ts=written)) == expected


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("nan-nan", "its ts is 'nan-nan'; give seconds such as '20.16-25.12'"),
        ("12", "its ts is '12'"),
        ("-1-2", "its ts is '-1-2'"),
        ("1e999-2", "its ts is '1e999-2'"),
        ("5-4", "its ts goes from 5 to 4"),
        ([-1, 2], "its ts goes from -1 to 2"),
        ([1, float("nan")], "its ts is [1, nan]; give a list of 2 finite numbers"),
        ([1], "its ts is [1]"),
        (None, "its ts is None"),
        (7, "its ts is 7"),
    ],
)
def test_moment_of_refuses(written: Any, reason: str) -> None:
    with pytest.raises(Defect) as found:
        moment_of(record(ts=written))
    assert found.value.bad.reason.startswith(reason)


def test_frames_come_in_the_order_of_their_numbers(folder: Folder) -> None:
    names = ["frame2.jpg", "frame10.JPG", "frame1.png", "frame-x.jpg"]
    for name in [*names, "Thumbs.db", ".DS_Store", "frame3.txt"]:
        (folder.path / name).touch()
    found = FrameFolders().frames(folder.path, record())
    assert [file.name for file in found] == ["frame1.png", "frame2.jpg", "frame10.JPG", "frame-x.jpg"]


def test_a_folder_is_listed_once(folder: Folder) -> None:
    folders = FrameFolders()
    folder.picture("1.png")
    assert len(folders.frames(folder.path, record())) == 1
    folder.picture("2.png")
    assert len(folders.frames(folder.path, record())) == 1


def test_frames_refuse_what_is_no_folder_of_pictures(folder: Folder) -> None:
    folder.write("some.json", {})
    for place, what in (("gone", "is no folder"), ("some.json", "is no folder"), (".", "holds no pictures")):
        with pytest.raises(Defect, match=f"{what}; extract its frames into a folder or correct the"):
            FrameFolders().frames(folder.path / place, record())


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800"])
def test_frames_refuse_names_that_no_folder_can_have(folder: Folder, name: str) -> None:
    with pytest.raises(Defect, match=r"some.jsonl: line 1: its video .* cannot be listed"):
        FrameFolders().frames(folder.path / name, record())
