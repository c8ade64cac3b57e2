"""`moadapt fit` on two processes that somebody else started trains what one process does."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.cli.conftest import Moadapt

ROOT = Path(__file__).parents[2]
FIT = "from moadapt.cli import main; import sys; sys.exit(main())"


def torchrun(folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    """Return the one command, which starts both processes."""
    program = folder / "program.py"
    program.write_text(FIT)
    return [(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)], {})]


def srun(folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    """Return the command of each task of a job, with the variables that SLURM gives it."""
    job = {
        "SLURM_JOB_ID": str(10000 + os.getpid() % 9000), "SLURM_JOB_NAME": "fit", "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0",
    }  # fmt: skip
    return [(["-c", FIT], {**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}) for rank in range(2)]


def launched(commands: list[tuple[list[str], dict[str, str]]], arguments: list[str]) -> str:
    """Run all commands at once and return what they say."""
    path = os.pathsep.join([str(ROOT), *sys.path])
    started = [
        subprocess.Popen(
            [sys.executable, *command, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, variables in commands
    ]
    told = "".join(process.communicate(timeout=300)[0] for process in started)
    assert [process.returncode for process in started] == [0] * len(started), told
    return told


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("start", [torchrun, srun])
def test_two_processes_fit_as_one(
    moadapt: Moadapt, tmp_path: Path, config: dict[str, Any], start: Any, strategy: str
) -> None:
    config["data"]["batch_size"] = 4
    config["model"]["ranks"] = {"class_path": "importance", "init_args": {"budget": 30, "every": 1, "settle": 0.4}}
    assert moadapt("fit") == 0
    trainer = {**config["trainer"], "default_root_dir": str(tmp_path / "two"), "devices": 2, "strategy": strategy}
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump({**config, "trainer": trainer}, sort_keys=False))
    told = launched(start(tmp_path), ["fit", "-c", str(file)])
    assert told.count("The mixture is in") == 1
    assert "Warning" not in told
    one, two = (load_file(tmp_path / each / "mixture" / "adapters.safetensors") for each in ("run", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)
    texts = [(tmp_path / each / "mixture" / "mixture.json").read_text() for each in ("run", "two")]
    assert texts[0] == texts[1]
