"""Balance between tasks, and what is measured of their conflicts, from a YAML file and the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import Moadapt


def test_a_balanced_run_is_measured_goes_on_and_is_tested(
    moadapt: Moadapt, config: dict[str, Any], tmp_path: Path
) -> None:
    config["model"]["balance"] = {"class_path": "gradnorm", "init_args": {"alpha": 0.5}}
    assert moadapt("fit", "--trainer.max_steps", "2", "--conflicts_every", "1") == 0
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["balance"]
    assert float(state["current"].mean()) == pytest.approx(1)
    assert moadapt("fit", "--trainer.max_steps", "4", "--conflicts_every", "1") == 0
    told = json.loads((tmp_path / "run" / "conflicts.json").read_text())
    assert [each["step"] for each in told["measured"]] == [0, 1, 2, 3]
    assert (tmp_path / "run" / "conflicts.png").stat().st_size > 1000
    assert moadapt("test") == 0


def test_settings_out_of_range_are_told(moadapt: Moadapt, capsys: pytest.CaptureFixture[str]) -> None:
    assert moadapt("fit", "--model.balance", "cagrad", "--model.balance.c", "2") == 2
    assert "CAGrad got c=2.0; give 0 or more and below 1" in capsys.readouterr().err
