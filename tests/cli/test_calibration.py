"""Starts and ranks that follow data, from a YAML file."""

from pathlib import Path
from typing import Any

import moadapt as package
from moadapt.bases import load_base
from moadapt.ranks.allocator import ranks_of
from tests.cli.conftest import Moadapt


def test_fit_finds_ranks_and_starts_from_its_data(
    moadapt: Moadapt, config: dict[str, Any], tmp_path: Path, base: str
) -> None:
    lora = {"class_path": "lora", "init_args": {"rank": 3, "init": "eva"}}
    corda = {"class_path": "lora", "init_args": {"rank": 2, "init": "corda_preserve"}}
    config["model"] |= {"shared": lora, "experts": {"small": lora, "large": corda}, "calibration_batches": 2}
    config["model"]["ranks"] = {"class_path": "explained_variance", "init_args": {"adapters": ["shared", "small"]}}
    assert moadapt("fit") == 0
    mixture = package.load(tmp_path / "run" / "mixture", load_base(base)[0])
    ranks = ranks_of(mixture.spec, mixture.anatomy)
    assert ranks["shared"] == ranks["small"]
    assert len(set(ranks["shared"].values())) > 1
    assert sum(ranks["shared"].values()) == 3 * len(ranks["shared"])
    assert set(ranks["large"].values()) == {2}
    assert moadapt("validate") == 0
    config["trainer"]["max_steps"] = 4
    assert moadapt("fit") == 0  # goes on from the checkpoint


def test_fit_refuses_a_number_of_batches_that_reads_nothing(
    moadapt: Moadapt, config: dict[str, Any], capsys: Any
) -> None:
    config["model"]["calibration_batches"] = 0
    assert moadapt("fit") == 2
    assert "calibration_batches is 0; give at least 1" in capsys.readouterr().err
