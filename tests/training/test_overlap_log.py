from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moadapt.adapters import LoRA
from moadapt.objectives import Orthogonality
from moadapt.placement import Placement
from moadapt.training import MixedTasks, MixtureModule
from moadapt.training.overlap_log import LogOverlaps
from moadapt_routers import ByTask
from tests.training import toy
from tests.training.runs import trainer


def validated(folder: Path, base: str, **parts: Any) -> tuple[MixtureModule, dict[str, float]]:
    """Train a step, validate with the callback, and return what was logged."""
    module = MixtureModule(base, **parts)
    fit = trainer(folder, LogOverlaps(folder / "run"), max_steps=1, limit_train_batches=1)
    fit.fit(module, datamodule=MixedTasks(base, toy.toy_tasks(folder), batch_size=4))
    return module, {n: v.item() for n, v in fit.callback_metrics.items() if n.startswith("overlap/")}


def test_overlaps_are_logged_and_drawn_at_validation(tmp_path: Path, base: str) -> None:
    vision = Placement(towers=("vision", "language"))
    experts = {"small": LoRA(rank=2), "large": LoRA(rank=3, placement=vision)}
    module, logged = validated(tmp_path, base, experts=experts, shared=LoRA(rank=2, placement=vision), router=ByTask())
    expected = {m: Orthogonality(measure=m).value(module.mixture).item() for m in ("deltas", "subspaces")}
    assert logged == pytest.approx({f"overlap/{measure}": value for measure, value in expected.items()}, rel=1e-4)
    with Image.open(tmp_path / "run" / "overlaps.png") as picture:
        assert min(picture.size) > 400


def test_nothing_is_logged_where_nothing_can_be_compared(tmp_path: Path, base: str) -> None:
    assert validated(tmp_path, base, shared=LoRA(rank=2))[1] == {}
    assert not (tmp_path / "run").exists()
