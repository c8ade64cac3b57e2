"""Tasks that stop early: their experts stand still, all else goes on, and a resumed run knows."""

import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from moadapt.adapters import LoRA
from moadapt.training import MixedTasks, MixtureModule, Optimization, StopTasks
from moadapt_routers import ByTask
from tests.training import toy
from tests.training.runs import trainer

SCORES = {"small": [0.5, 0.4, 0.5, 0.6, 0.9], "large": [0.1, 0.2, 0.3, 0.3, 0.3]}


class Scored(MixtureModule):
    """Validations give the scores of a table, one after the other."""

    def on_validation_epoch_end(self) -> None:
        index = self.trainer.global_step // 2 - 1
        for name, scores in SCORES.items():
            self.log(f"{name}/exact", scores[index])


class Moves(Callback):
    """Notes which adapters each step moved."""

    def __init__(self) -> None:
        self.moved: dict[int, set[str]] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, *rest: Any) -> None:
        self.before = {name: tensor.clone() for name, tensor in module.tensors().items()}

    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        now = module.tensors()
        self.moved[trainer.global_step] = {
            part for name, old in self.before.items() if not torch.equal(old, now[name]) for part in name.split("/")
        } & {"small", "large", "shared"}


def fit(folder: Path, base: str, *callbacks: Callback, **options: Any) -> tuple[Any, Scored]:
    lightning.seed_everything(0, verbose=False)
    settings = Optimization(learning_rate=1e-2, warmup=0, weight_decay=0.5, schedule="constant")
    module = Scored(base, {"small": LoRA(rank=2), "large": LoRA(rank=2)}, LoRA(rank=2), ByTask(), optimization=settings)
    module.configure_model()
    for parameter in module.roles():
        nn.init.normal_(parameter, std=0.2)
    data = MixedTasks(base, toy.toy_tasks(folder), batch_size=4)
    checked = {"check_val_every_n_epoch": None, "val_check_interval": 2, "limit_val_batches": 1}
    made = trainer(folder, *callbacks, **{"max_steps": 10, **checked, **options})
    last = folder / "some.ckpt"
    made.fit(module, datamodule=data, ckpt_path=last if last.is_file() else None, weights_only=True)
    return made, module


def test_the_expert_of_a_task_that_stopped_stands_still(tmp_path: Path, base: str) -> None:
    stop, watch = StopTasks(patience=2), Moves()
    done, _ = fit(tmp_path, base, stop, watch)
    assert stop.stopped == {"small": 6, "large": 10}  # after two validations that were no better
    everyone = {"small", "large", "shared"}
    assert watch.moved == {step: everyone - ({"small"} if step > 6 else set()) for step in range(1, 11)}
    assert stop.best == pytest.approx({"small": 0.5, "large": 0.3})
    assert done.global_step == 10


def test_a_run_ends_when_all_tasks_stopped_and_stays_ended(tmp_path: Path, base: str) -> None:
    done, _ = fit(tmp_path, base, StopTasks(patience=1), max_steps=50)
    assert done.global_step == 8  # large has its best at 6, small at 2
    done.save_checkpoint(tmp_path / "some.ckpt")
    again, _ = fit(tmp_path, base, StopTasks(patience=1), max_steps=50)
    assert again.global_step == 8


@pytest.mark.parametrize("at", [3, 7])
def test_a_run_stopped_anywhere_ends_as_the_undisturbed_one(tmp_path: Path, base: str, at: int) -> None:
    class Leave(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
            if trainer.global_step == at:
                trainer.save_checkpoint(tmp_path / "parts" / "some.ckpt")
                trainer.should_stop = True

    whole: dict[str, Tensor] = fit(tmp_path / "whole", base, StopTasks(patience=2))[1].tensors()
    fit(tmp_path / "parts", base, StopTasks(patience=2), Leave())
    stop = StopTasks(patience=2)
    parts = fit(tmp_path / "parts", base, stop)[1].tensors()
    assert stop.stopped == {"small": 6, "large": 10}
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"min_delta": -0.1}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need at least 1, and 0"):
        StopTasks(**wrong)


def test_a_score_that_is_no_number_is_no_improvement_and_no_best() -> None:
    class Asked:
        global_step, is_global_zero = 5, True

    stop, asked = StopTasks(patience=3), Asked()
    for score in (math.nan, 0.5, math.nan, 0.9):
        stop._judge("a", score, asked)  # type: ignore[arg-type]
    assert stop.best == {"a": 0.9}
    assert stop.waited == {"a": 0}
    for _ in range(3):
        stop._judge("a", math.nan, asked)  # type: ignore[arg-type]
    assert stop.stopped == {"a": 5}
