"""Schedules and monitors in configurations."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import Moadapt

MODES = {
    "held": ([{"kinds": ["shared", "router"], "share": 0.9}], False),
    "free": ([{"kinds": ["expert"], "depth": [0, 0.5], "epoch": 1}], True),
}


@pytest.mark.parametrize("mode", MODES)
def test_fit_takes_stages_of_unfreezing_and_goes_on(
    moadapt: Moadapt, config: dict[str, Any], tmp_path: Path, mode: str
) -> None:
    stages, moves = MODES[mode]
    config["model"]["optimization"] = {"unfreezing": stages, "kind_learning_rates": {"shared": 0.1}}
    assert moadapt("fit", "--trainer.max_steps", "1", "--trainer.max_epochs", "9") == 0
    first = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert moadapt("fit", "--trainer.max_steps", "2", "--trainer.max_epochs", "9") == 0
    second = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    moved = {
        name for name, tensor in second["state_dict"].items() if not torch.equal(first["state_dict"][name], tensor)
    }
    assert any("/small/" in name for name in moved)
    assert any("/shared/" in name for name in moved) == moves


def test_a_stage_that_makes_no_sense_is_told(
    moadapt: Moadapt, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for stage, told in (
        ({"kinds": ["experts"], "share": 0.5}, "shared, expert, cross_modal, router"),
        ({"kinds": ["cross_modal"], "share": 0.5}, "names nothing that is trained"),
        ({"kind": ["expert"], "share": 0.5}, "kind"),
    ):
        config["model"]["optimization"] = {"unfreezing": [stage]}
        assert moadapt("fit") == 2
        assert told in capsys.readouterr().err
