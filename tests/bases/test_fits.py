"""Bases of every class, from their folders, are trained and tested by the trainer."""

from pathlib import Path

import pytest

from moadapt import Placement
from moadapt.adapters import LoRA
from moadapt.training import MixedTasks, MixtureModule, Optimization
from moadapt_routers import ByTask
from tests.bases.rows import WRITERS
from tests.bases.twins import twin
from tests.training import runs, toy

QUICK = ("gpt2", "t5", "blip2", "florence2")


@pytest.mark.filterwarnings("ignore:Found .* eval mode")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in WRITERS]
)
def test_a_base_is_trained_and_asked_from_its_folder(name: str, tmp_path: Path) -> None:
    written = twin(name)
    written.model.save_pretrained(tmp_path / "base")
    written.processor.save_pretrained(tmp_path / "base")
    data = MixedTasks(str(tmp_path / "base"), toy.toy_tasks(tmp_path, rows=(1, 1)), batch_size=2)
    experts, settings = {"small": LoRA(rank=4), "large": LoRA(rank=4)}, Optimization(learning_rate=0.03)
    placement = Placement(kinds=("attention", "mlp"))
    module = MixtureModule(str(tmp_path / "base"), experts, None, ByTask(), placement, optimization=settings)
    trainer = runs.trainer(tmp_path, max_steps=40)
    trainer.fit(module, datamodule=data)
    [scores] = trainer.test(module, datamodule=data, verbose=False)
    assert scores["small/exact"] == scores["large/exact"] == 1  # `red` and its end, and in capitals
