"""`moadapt fit -c configs/demo.yaml`, stopped anywhere and typed again, ends as without the stop, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.outcome import assert_same, outcome

ROOT = Path(__file__).parents[2]
# An epoch has 7 steps of 32 rows; validations are due after 5 and 10.
SMALL = (
    "--trainer.max_steps", "12", "--trainer.val_check_interval", "5", "--keep_every", "4",
    "--data.dataset.train", "30", "--data.dataset.validation", "4", "--data.dataset.test", "1",
    "--trainer.callbacks+=tests.cli.signalling.Signalling",
)  # fmt: skip


def fit(folder: Path, name: str, at: str | None = None) -> tuple[int, str]:
    """Run the command in a process group of its own, to be stopped at a moment; return its status and what it says."""
    listening = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"  # also in the background
    code = f"{listening}; from moadapt.cli import main; sys.exit(main())"
    roots = ("--trainer.default_root_dir", str(folder / name), "--data.dataset.root", str(folder / "data"))
    path = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code, "fit", "-c", "configs/demo.yaml", *SMALL, *roots],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **({"SIGNAL_AT": at} if at else {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        timeout=900,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run that nothing stopped, and of the data."""
    folder = tmp_path_factory.mktemp("demo")
    status, told = fit(folder, "whole")
    assert status == 0, told
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "stops",
    [
        ["train:3:SIGINT"],
        ["train:6:SIGUSR1"],  # the last of its epoch
        ["validation:1:SIGINT"],
        ["train:4:SIGTERM", "validation:0:SIGTERM", "train:5:SIGINT"],  # a validation owed, then cut short
        ["start:0:SIGINT", "start:0:SIGUSR2", "train:0:SIGTERM"],
        ["train:6:SIGKILL", "train:10:SIGKILL"],  # from what was kept after 4 and 8 steps
    ],
    ids=" ".join,
)
def test_a_stopped_run_ends_as_the_whole_one(whole: Path, stops: list[str], request: pytest.FixtureRequest) -> None:
    name = request.node.name.replace(":", "-").replace(" ", "-")
    for stop in stops:
        number = signal.Signals[stop.split(":")[2]]
        status, told = fit(whole, name, stop)
        assert status == (-number if number == signal.SIGKILL else 128 + number), told
        assert "Traceback" not in told
        assert not (whole / name / "mixture").exists()
    status, told = fit(whole, name)
    assert status == 0, told
    assert_same(outcome(whole / name), outcome(whole / "whole"))
