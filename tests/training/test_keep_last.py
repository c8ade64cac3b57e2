"""A run that is stopped anywhere and resumed ends as the uninterrupted one, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from moadapt.sampling import Dynamic
from moadapt.stop_signals import STOP_SIGNALS
from moadapt.training import KeepLast, MixedTasks, Stopped
from moadapt.training.kept import read_checkpoint
from tests.training import toy
from tests.training.runs import module, run, trainer

ROOT = Path(__file__).parents[2]
BY_EPOCHS = {"max_epochs": 3}
IN_EPOCHS = {"max_epochs": 3, "val_check_interval": 2}
BY_STEPS = {"max_steps": 7, "val_check_interval": 2, "check_val_every_n_epoch": None}
RARELY = {"max_epochs": 4, "check_val_every_n_epoch": 2}
ACCUMULATED = {"max_epochs": 3, "accumulate_grad_batches": 2}
FOLLOWING = {**BY_STEPS, "sampling": Dynamic(floor=0.0, power=4.0), "workers": 1}
NEVER = {"max_epochs": 2, "limit_val_batches": 0}

_wholes: dict[str, Any] = {}


def same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def compare(folder: Path, base: str, at: tuple[str, int], options: dict[str, Any]) -> None:
    """Stop a run of three steps an epoch at one moment, resume it, and compare it with a whole one."""
    key = str(options)
    if key not in _wholes:
        _wholes[key] = run(folder / "whole", base, **options)
    whole, watched = _wholes[key]
    first, before = run(folder / "cut", base, at=at, **options)
    assert first is None
    assert len(before.trained) < len(watched.trained) or before.validated != watched.validated
    second, after = run(folder / "cut", base, **options)
    assert before.trained + after.trained == watched.trained
    assert before.validated + after.validated == watched.validated
    assert before.ended + after.ended == watched.ended
    assert same(second, whole)


@pytest.mark.parametrize(
    ("options", "at"),
    [
        (BY_EPOCHS, ("train", 1)),
        (BY_EPOCHS, ("train", 5)),
        (IN_EPOCHS, ("train", 1)),
        (BY_STEPS, ("train", 4)),
        (ACCUMULATED, ("train", 2)),
        (FOLLOWING, ("train", 4)),
        (FOLLOWING, ("validation", 5)),
        (NEVER, ("train", 2)),
    ],
    ids=[
        "mid",
        "last-of-epoch",
        "validation-owed",
        "by-steps",
        "accumulated",
        "following",
        "to-follow",
        "no-validation",
    ],
)
def test_a_resumed_run_ends_as_the_whole_one(
    tmp_path: Path, base: str, options: dict[str, Any], at: tuple[str, int]
) -> None:
    compare(tmp_path, base, at, options)


def test_a_validation_that_was_cut_short_is_done_afresh(tmp_path: Path, base: str) -> None:
    compare(tmp_path, base, ("validation", 5), BY_EPOCHS)


@pytest.mark.slow
@pytest.mark.parametrize("options", [BY_EPOCHS, IN_EPOCHS, BY_STEPS, RARELY, ACCUMULATED, FOLLOWING, NEVER])
def test_every_moment_is_one_to_stop_at(tmp_path: Path, base: str, options: dict[str, Any]) -> None:
    _whole, watched = _wholes[str(options)] = run(tmp_path / "whole", base, **options)
    steps, checks = watched.trained[-1][0], watched.checked
    for number, at in enumerate([*(("train", s) for s in range(steps)), *(("validation", b) for b in range(checks))]):
        compare(tmp_path / str(number), base, at, options)


class Pressing(Callback):
    """Sends this process several signals within one step."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def on_train_batch_start(self, *of_step: Any) -> None:
        for number in self.numbers:
            signal.raise_signal(number)


def pressed(folder: Path, base: str, *numbers: int) -> None:
    data = MixedTasks(base, toy.toy_tasks(folder), batch_size=3)
    fit = trainer(folder, Pressing(*numbers), KeepLast(folder), max_steps=9, limit_val_batches=0)
    fit.fit(module(base), datamodule=data)


@pytest.mark.parametrize("first", STOP_SIGNALS)
def test_the_first_signal_counts_and_others_do_not_cut_its_checkpoint_short(
    tmp_path: Path, base: str, first: int
) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(Stopped, match=f"stopped by {signal.Signals(first).name}; .*last.ckpt holds the state") as found:
        pressed(tmp_path, base, first, signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM)
    assert found.value.number == first
    assert read_checkpoint(found.value.file)["global_step"] == 1
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_ctrl_c_after_another_signal_acts_at_once(tmp_path: Path, base: str) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which processes that run tests may ignore
    try:
        with pytest.raises(SystemExit):
            pressed(tmp_path, base, signal.SIGTERM, signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "last.ckpt").exists()


def test_a_run_that_has_ended_is_not_trained_again(tmp_path: Path, base: str) -> None:
    whole, _ = run(tmp_path / "whole", base, max_epochs=1)
    again, watched = run(tmp_path / "whole", base, max_epochs=1)
    assert not watched.trained
    assert same(again, whole)


SCRIPT = """
import sys, torch
from pathlib import Path
from tests.training.runs import run
folder, base, workers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
tensors, _ = run(folder, base, workers=workers, announce=True, max_epochs=40, limit_val_batches=0)
if tensors is not None:
    torch.save(tensors, folder / "result.pt")
"""


def process(folder: Path, base: str, workers: int, stop: signal.Signals | None) -> str:
    """Train in a process of its own; send a signal to its whole group, as a terminal does, after the fifth step."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", SCRIPT, str(folder), base, str(workers)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as child:
        assert child.stdout is not None
        lines = []
        for line in child.stdout:
            lines.append(line)
            if stop is not None and line == "step 5\n":
                time.sleep(0.01)  # somewhere within the next step
                os.killpg(child.pid, stop)
                stop = None
    assert child.returncode == 0, "".join(lines)
    return "".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_real_signal_stops_in_good_order(tmp_path: Path, base: str, workers: int, stop: signal.Signals) -> None:
    toy.toy_tasks(tmp_path)
    process(tmp_path / "whole", base, 0, None)
    output = process(tmp_path / "cut", base, workers, stop)
    assert not (tmp_path / "cut" / "result.pt").exists(), output
    assert "step 60" not in output
    process(tmp_path / "cut", base, workers, None)
    whole, cut = (torch.load(tmp_path / name / "result.pt", weights_only=True) for name in ("whole", "cut"))
    assert same(cut, whole)
