"""Checkpoints are whole or not there, broken ones are known, and the one before takes their place."""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moadapt.training import KeepLast
from moadapt.training.kept import Kept, fault, listed, newest, read_checkpoint
from moadapt.training.run_failed import RunFailed
from tests.training import toy
from tests.training.cramped import short_files
from tests.training.runs import MixedTasks, Watch, module, trainer


def checkpoint(step: int) -> dict[str, Any]:
    """Of a size at which a flipped bit is in a tensor."""
    return {"global_step": step, "loops": {}, "optimizer_states": [], "state_dict": {"a": torch.full((5000,), step)}}


def steps(folder: Path) -> dict[str, int]:
    return {file.name: read_checkpoint(file)["global_step"] for file in listed(folder)}


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


SPOILS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "last byte": lambda content: content[:-1],
    "zeros": lambda content: bytes(len(content)),
    "zeros within": lambda content: content[:10000] + bytes(4096) + content[14096:],
    "garbage": lambda content: random.Random(0).randbytes(len(content)),
    "one bit": flipped,
}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_as_asked_are_kept_and_the_newest_is_found(tmp_path: Path, keep: int) -> None:
    assert newest(tmp_path / "missing") is None
    kept = Kept(tmp_path / "run", keep)
    names = ["last.ckpt", "last-1.ckpt", "last-2.ckpt"]
    for step in range(1, 6):
        kept.write(checkpoint(step))
        assert steps(tmp_path / "run") == dict(zip(names[:keep], range(step, 0, -1), strict=False))
        assert newest(tmp_path / "run") == tmp_path / "run" / "last.ckpt"
    assert len(list((tmp_path / "run").iterdir())) == keep


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_broken_one_is_known_by_its_bytes(tmp_path: Path, spoil: str, caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept(tmp_path, 2)
    for step in (1, 2):
        kept.write(checkpoint(step))
    last, before = kept.files
    assert fault(last) is None
    last.write_bytes(SPOILS[spoil](last.read_bytes()))
    why = fault(last)
    assert why
    assert newest(tmp_path) == before
    assert f"{last} is broken ({why}); going on from last-1.ckpt" in caplog.text
    kept.start(before)
    kept.write(checkpoint(3))
    assert steps(tmp_path) == {"last.ckpt": 3, "last-1.ckpt": 1}


def test_whatever_byte_is_damaged_a_checkpoint_is_the_same_or_at_fault(tmp_path: Path) -> None:
    whole, file = tmp_path / "whole.ckpt", tmp_path / "last.ckpt"
    torch.save({**checkpoint(3), "state_dict": {"a": torch.arange(4.0)}}, whole)
    content, expected = whole.read_bytes(), read_checkpoint(whole)["state_dict"]["a"]
    found = []
    for place in range(0, len(content), 3):
        file.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        found.append(fault(file))
        if found[-1] is None:
            assert torch.equal(read_checkpoint(file)["state_dict"]["a"], expected)
    assert sum(each is not None for each in found) > len(found) / 4


@pytest.mark.parametrize("content", [{"weights": torch.ones(2)}, [1, 2], {**checkpoint(1), "code": print}])
def test_what_is_no_checkpoint_is_none(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "last.ckpt")
    assert fault(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last.ckpt is broken \(.*\). There is nothing whole to go on from"):
        newest(tmp_path)


@pytest.mark.parametrize(
    ("loaded", "left"),
    [
        ("last.ckpt", {"last.ckpt": 9, "last-1.ckpt": 3}),
        ("last-1.ckpt", {"last.ckpt": 9, "last-1.ckpt": 2}),
        (None, {"last.ckpt": 9}),
        ("elsewhere.ckpt", {"last.ckpt": 9}),
    ],
)
def test_checkpoints_that_do_not_lead_to_the_run_are_dropped_with_its_first_write(
    tmp_path: Path, loaded: str | None, left: dict[str, int]
) -> None:
    for step in (1, 2, 3):
        Kept(tmp_path, 3).write(checkpoint(step))
    (tmp_path / "elsewhere.ckpt").write_bytes(b"")
    kept = Kept(tmp_path, 2)
    kept.start(None if loaded is None else tmp_path / loaded)
    assert len(listed(tmp_path)) == 3
    kept.write(checkpoint(9))
    assert steps(tmp_path) == left


def test_a_name_that_is_missing_between_two_renames_costs_nothing(tmp_path: Path) -> None:
    kept = Kept(tmp_path, 2)
    for step in (1, 2):
        kept.write(checkpoint(step))
    kept.files[0].replace(kept.files[1])  # and the power goes
    assert newest(tmp_path) == kept.files[1]
    kept.start(kept.files[1])
    kept.write(checkpoint(3))
    assert steps(tmp_path) == {"last.ckpt": 3, "last-1.ckpt": 2}


def test_the_file_and_then_its_folder_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def flushing(number: int) -> None:
        happened.append(("flush", Path(os.readlink(f"/proc/self/fd/{number}")).name))
        fsync(number)

    def renaming(old: Any, new: Any) -> None:
        happened.append(("rename", Path(new).name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(os, "replace", renaming)
    Kept(tmp_path, 2).write(checkpoint(1))
    assert happened == [("flush", ".last.ckpt"), ("rename", "last.ckpt"), ("flush", tmp_path.name)]


def test_a_full_disk_leaves_what_was_kept(tmp_path: Path) -> None:
    kept = Kept(tmp_path, 2)
    for step in (1, 2):
        kept.write(checkpoint(step))
    (tmp_path / ".last.ckpt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as found:
        kept.write(checkpoint(3))
    assert found.value.errno == errno.ENOSPC
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last-1.ckpt", "last.ckpt"]
    assert steps(tmp_path) == {"last.ckpt": 2, "last-1.ckpt": 1}
    kept.write(checkpoint(3))
    assert steps(tmp_path) == {"last.ckpt": 3, "last-1.ckpt": 2}


class Cramped(KeepLast):
    """Finds no room at some steps."""

    full: tuple[int, ...] = ()

    def _write(self, trainer: Any) -> str | None:
        if trainer.global_step not in self.full:
            return super()._write(trainer)
        with short_files():
            return super()._write(trainer)


def fit(folder: Path, base: str, *full: int, at: tuple[str, int] | None = None) -> None:
    last = Cramped(folder, every_n_steps=2)
    last.full = full
    data = MixedTasks(base, toy.toy_tasks(folder.parent), batch_size=3)
    trainer(folder, Watch(at), last, max_steps=7, limit_val_batches=0).fit(module(base), datamodule=data)


def test_a_run_goes_on_where_a_checkpoint_finds_no_room(
    tmp_path: Path, base: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    fit(run, base, 4)
    assert f"step 4 could not be kept in {run / 'last.ckpt'}: File too large" in caplog.text
    assert "the run goes on, and tries again in 2 steps" in caplog.text
    assert steps(run) == {"last.ckpt": 7, "last-1.ckpt": 2}  # after 6 steps an epoch ends


@pytest.mark.parametrize(
    ("at", "what"), [(None, "the training is done, but step 7"), (("train", 4), "SIGINT asked to stop, but step 5")]
)
def test_a_last_checkpoint_that_finds_no_room_is_an_error(
    tmp_path: Path, base: str, at: tuple[str, int] | None, what: str
) -> None:
    run = tmp_path / "run"
    with pytest.raises(RunFailed, match=f"{what} could not be kept.* is whole; free space there"):
        fit(run, base, 5, 7, at=at)
    assert fault(run / "last.ckpt") is None
    assert not (run / ".last.ckpt").exists()
