import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import Logger
from PIL import Image

from moadapt.adapters import LoRA, PeftTuner
from moadapt.balancing import PCGrad
from moadapt.training import MixedTasks, MixtureModule, data
from moadapt.training.conflict_log import LogConflicts
from moadapt_routers import ByTask, Poly
from tests.training import toy
from tests.training.processes import fit
from tests.training.runs import trainer
from tests.training.test_ddp import EXACT, TaskByTask, made, mixture


class Kept(Logger):
    """Keeps what is logged."""

    name, version = "kept", "0"

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        return

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(name.startswith("conflict/") for name in metrics):
            self.found.append((step or 0, dict(metrics)))


def module_of(base: str, **options: Any) -> MixtureModule:
    torch.manual_seed(0)
    experts = {name: LoRA(rank=2, dropout=0.2) for name in ("small", "large")}
    options = {"experts": experts, "shared": LoRA(rank=2, dropout=0.2), "router": ByTask(), **options}
    return MixtureModule(base, **options)


def test_cosines_are_those_of_separate_passes(tmp_path: Path, base: str) -> None:
    module, logger, log = module_of(base), Kept(), LogConflicts(tmp_path / "run", every_n_steps=2)
    expected: list[float] = []

    class Separately(LogConflicts):
        """Finds the same from one pass a task."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step % 2 == 0:
                shared = [
                    bank.get_parameter(f"shared_{side}")
                    for _, bank in module.mixture.banks()
                    for side in ("down", "up")
                ]
                found = []
                for name in ("small", "large"):
                    rows = torch.tensor([task == name for task in batch.task_names])
                    losses, _ = module.losses(batch)
                    parts = torch.autograd.grad(losses[rows].sum(), shared)
                    found.append(torch.cat([part.flatten() for part in parts]))
                expected.append(float(torch.nn.functional.cosine_similarity(*found, dim=0)))

    tasks = MixedTasks(base, toy.toy_tasks(tmp_path, rows=(6, 6)), batch_size=6)
    callbacks = [log, Separately(tmp_path / "other")]
    trainer(tmp_path, *callbacks, max_steps=4, limit_val_batches=0, logger=logger).fit(module, datamodule=tasks)
    assert [step for step, _ in logger.found] == [0, 2]
    for (_, logged), cosine in zip(logger.found, expected, strict=True):
        assert logged == pytest.approx({"conflict/mean": cosine, "conflict/lowest": cosine}, abs=1e-4)
    told = json.loads((tmp_path / "run" / "conflicts.json").read_text())
    assert told["tasks"] == ["small", "large"]
    assert [each["cosines"][0][1] for each in told["measured"]] == pytest.approx(expected, abs=1e-3)
    with Image.open(tmp_path / "run" / "conflicts.png") as picture:
        assert min(picture.size) > 400


@pytest.mark.parametrize("balance", [None, PCGrad()], ids=["plain", "pcgrad"])
def test_measuring_changes_nothing_of_the_training(tmp_path: Path, base: str, balance: PCGrad | None) -> None:
    ends = []
    for callbacks in ([], [LogConflicts(tmp_path / "run", every_n_steps=1)]):
        module = module_of(base, balance=balance)
        tasks = MixedTasks(base, toy.toy_tasks(tmp_path), batch_size=4)
        trainer(tmp_path, *callbacks, max_steps=3, limit_val_batches=0).fit(module, datamodule=tasks)
        ends.append(module.state_dict())
    assert (tmp_path / "run" / "conflicts.json").exists()
    assert all(torch.equal(ends[1][name], tensor) for name, tensor in ends[0].items())


def test_two_processes_measure_what_one_does(tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MixedOrder", TaskByTask)
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        fit(
            folder, lambda: made(lambda: mixture(base, ByTask()), tmp_path), processes, LogConflicts(folder, 1), **EXACT
        )
    one, two = (json.loads((tmp_path / name / "conflicts.json").read_text()) for name in ("1", "2"))
    assert len(one["measured"]) == 3
    assert one == two


def test_a_resumed_run_goes_on_with_its_file(tmp_path: Path, base: str) -> None:
    log = LogConflicts(tmp_path, every_n_steps=1)
    told = {"tasks": ["small", "large"], "measured": [{"step": step, "cosines": [[1, 0], [0, 1]]} for step in (0, 5)]}
    (tmp_path / "conflicts.json").write_text(json.dumps(told))

    class At:
        global_step = 3

    log.on_train_start(At(), module_of(base))  # type: ignore[arg-type]
    assert [each["step"] for each in log._found] == [0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"shared": None}, "none is trained"),
        ({"shared": PeftTuner(), "experts": None, "router": None}, "PeftTuner"),
        ({"router": Poly()}, "blends the parameters"),
    ],
    ids=["none", "peft", "blended"],
)
def test_what_cannot_be_told_is_said_once(
    tmp_path: Path, base: str, options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = module_of(base, **options)
    tasks = MixedTasks(base, toy.toy_tasks(tmp_path), batch_size=4)
    with caplog.at_level("INFO", logger="moadapt.training.conflict_log"):
        log = LogConflicts(tmp_path / "run", every_n_steps=1)
        trainer(tmp_path, log, max_steps=2, limit_val_batches=0).fit(module, datamodule=tasks)
    told = [record.getMessage() for record in caplog.records if record.name.endswith("conflict_log")]
    assert len(told) == 1
    assert reason in told[0]
    assert not (tmp_path / "run").exists()


def test_a_task_alone_has_no_cosine() -> None:
    from moadapt.training.task_gradients import cosines

    found = cosines(torch.tensor([[4.0, 0.0, 2.0], [0.0, 0.0, 0.0], [2.0, 0.0, 4.0]]))
    assert found[0, 2] == 0.5
    assert math.isnan(found[0, 1])


def test_steps_below_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        LogConflicts(tmp_path, every_n_steps=0)
