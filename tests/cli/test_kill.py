"""Runs whose processes are killed at any moment: the same command goes on, and ends as the undisturbed run did."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.outcome import assert_same, outcome
from tests.cli.recording import fit

ROOT = Path(__file__).parents[2]
ROWS = (24, 16)
BATCH = 5
STEPS = 120
KILLS = 20


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["moadapt.cli.trainer", "tests.cli.recording", "tests.training.toy"])


def alive(pids: set[int]) -> set[int]:
    """Those processes that run."""
    files = {pid: Path(f"/proc/{pid}/stat") for pid in pids}
    return {
        pid for pid, file in files.items() if file.exists() and file.read_text().rpartition(")")[2].split()[0] != "Z"
    }


@dataclass
class Command:
    """`moadapt fit` in a process of its own, forked from one that has imported all.

    Args:
        folder: Of base, data and runs.
        name: Of the run.
        trainer: More of its settings.
    """

    folder: Path
    name: str
    trainer: dict[str, Any]

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / self.name

    def settings(self) -> dict[str, Any]:
        """A run of epochs of eight steps, with dropout, that is validated every five."""
        colour = "tests.training.toy.Colour"
        lora = {"class_path": "lora", "init_args": {"rank": 2, "dropout": 0.1}}
        roots = {name: str(self.folder / name) for name in ("small", "large")}
        return {
            "trainer": {
                "default_root_dir": str(self.run), "accelerator": "cpu", "max_steps": STEPS, "val_check_interval": 5,
                "check_val_every_n_epoch": None, "log_every_n_steps": 1,
                "callbacks": [{"class_path": "tests.cli.recording.Recording"}], **self.trainer,
            },
            "model": {
                "base": str(self.folder / "base"), "shared": lora, "experts": {"small": lora, "large": lora},
                "router": {"class_path": "softmax"}, "dtype": "float32",
            },
            "data": {
                "batch_size": BATCH,
                "tasks": {
                    name: {"class_path": colour, "init_args": {"root": roots[name], "rows": count}}
                    for name, count in zip(roots, ROWS, strict=True)
                },
            },
            "keep_every": 3,
        }  # fmt: skip

    def written(self) -> Path:
        """Write its configuration."""
        self.run.mkdir(exist_ok=True)
        config = self.folder / f"{self.name}.yaml"
        config.write_text(yaml.safe_dump(self.settings(), sort_keys=False))
        return config

    def start(self) -> ForkServerProcess:
        """Start it; what it says goes to `output.txt`."""
        child = FORKS.Process(target=fit, args=(self.written(), self.run))
        child.start()
        return child

    def whole(self) -> dict[str, Any]:
        """Let it come to its end."""
        child = self.start()
        child.join(timeout=600)
        assert child.exitcode == 0, self.said()
        return outcome(self.run)

    def said(self) -> str:
        """What it said, all times together."""
        return (self.run / "output.txt").read_text()

    def recorded(self, rank: int = 0) -> list[dict[str, Any]]:
        """Every step that a process began, also those that were lost."""
        file = self.run / f"{rank}.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait_for(self, pid: int | None, steps: int, rank: int = 0) -> None:
        """Wait until so many more steps were begun, or the command ended."""
        assert pid is not None
        before = len(self.recorded(rank))
        while len(self.recorded(rank)) < before + steps:
            assert alive({pid}), self.said()
            time.sleep(0.002)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a base, for data and runs."""
    from tests.training import toy

    made = tmp_path_factory.mktemp("killed")
    toy.write_base(made / "base")
    return made


def rows_of_epochs(command: Command) -> dict[int, list[int]]:
    """The rows that each epoch's steps were taken on: of those begun more than once, the last."""
    steps = {line["step"]: line for line in command.recorded()}
    found: dict[int, list[int]] = {}
    for _, line in sorted(steps.items()):
        found.setdefault(line["epoch"], []).extend(line["rows"])
    return found


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_as_the_undisturbed_one(folder: Path) -> None:
    expected = Command(folder, "whole", {}).whole()
    command, random_ = Command(folder, "killed", {}), random.Random(0)
    steps_at_kills = []
    for _ in range(KILLS):
        child = command.start()
        command.wait_for(child.pid, random_.randint(1, 7))
        time.sleep(random_.uniform(0, 0.1))  # within a step, a validation, or a checkpoint
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, "the run ended before it was killed often enough"
        steps_at_kills.append(command.recorded()[-1]["step"])
    assert_same(command.whole(), expected)
    assert max(steps_at_kills) > STEPS / 3
    began = Counter(line["step"] for line in command.recorded())
    assert max(began.values()) > 1  # steps were lost and taken again
    assert {step: rows(command)[step] for step in began} == rows(Command(folder, "whole", {}))
    every = list(range(sum(ROWS)))
    assert [sorted(own) for own in rows_of_epochs(command).values()] == [every] * (STEPS * BATCH // sum(ROWS))


def rows(command: Command) -> dict[int, set[tuple[int, ...]]]:
    """What each step was begun on; a step that is taken again has the same rows."""
    found: dict[int, set[tuple[int, ...]]] = {}
    for line in command.recorded():
        found.setdefault(line["step"], set()).add(tuple(line["rows"]))
    return found


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
TWO = {"devices": 2, "strategy": "ddp", "max_steps": 24}


@pytest.fixture(scope="module")
def of_two(folder: Path) -> dict[str, Any]:
    """What two undisturbed processes come to."""
    return Paired(folder, "two", TWO).whole()


class Paired(Command):
    """Of two processes, which are started from a script, and so of a batch that is even."""

    def launch(self, launcher: Sequence[str] = ()) -> "subprocess.Popen[str]":
        """Start it; what all of its processes say goes to `output.txt`."""
        config, script = self.written(), self.folder / "moadapt_fit.py"
        script.write_text("import sys\nfrom moadapt.cli import main\nsys.exit(main())\n")
        path = os.pathsep.join([str(ROOT), *sys.path])
        with (self.run / "output.txt").open("a") as output:
            return subprocess.Popen(
                [sys.executable, *launcher, str(script), "fit", "-c", str(config)],
                env={**os.environ, "PYTHONPATH": path, "RECORD": str(self.run)},
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def whole(self) -> dict[str, Any]:
        """Let it come to its end."""
        assert self.launch().wait(timeout=600) == 0, self.said()
        return outcome(self.run)

    def settings(self) -> dict[str, Any]:
        given = super().settings()
        given["data"]["batch_size"] = 4
        return given


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "rank"), [((), 1), ((), 0), (TORCHRUN, 1)], ids=["child", "first", "torchrun"])
def test_a_killed_process_ends_the_run_soon_and_it_goes_on_from_what_was_kept(
    folder: Path, of_two: dict[str, Any], launcher: Sequence[str], rank: int, request: pytest.FixtureRequest
) -> None:
    command = Paired(folder, request.node.callspec.id, TWO)
    child = command.launch(launcher)
    command.wait_for(child.pid, 8, rank)
    pids = {each: command.recorded(each)[-1]["pid"] for each in (0, 1)}
    os.kill(pids[rank], signal.SIGKILL)
    began = time.monotonic()
    child.wait(timeout=60)
    while alive({child.pid, *pids.values()}):
        assert time.monotonic() - began < 60, "a process is left"
        time.sleep(0.1)
    assert child.returncode != 0
    assert f"The run ends: process {rank} (pid {pids[rank]} on " in command.said()
    assert "is gone: killed" in command.said()
    assert_same(command.whole(), of_two)
    begun = [line["step"] for line in command.recorded()]
    assert begun[0] == 0
    assert begun.count(0) == 1  # it went on, and did not start over
