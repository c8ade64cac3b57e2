"""Gradients of experts as means over the rows that used them."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import moadapt
from moadapt.adapters import LoRA
from moadapt.router import RouterSpec
from moadapt.training import Optimization, data
from moadapt.training.expert_use import ExpertUse
from moadapt_routers import ByTask, Constant, Poly, TopK
from tests import models
from tests.training.processes import assert_same, fit
from tests.training.test_ddp import EXACT, FAST, TOWERS, TaskByTask, half_blind, made, mixture

USED = replace(FAST, expert_mean="use")


def gradients(folder: Path, make: Any, **options: Any) -> dict[str, torch.Tensor]:
    """Those of the first step, not clipped, and the answer tokens of each task in it."""
    [found] = fit(folder, make, 1, **{**EXACT, "gradient_clip_val": None, "max_steps": 1, **options})
    first = {name: gradient for name, gradient in found["gradients"][0].items() if "banks" in name}
    counts = torch.tensor([sums[1] for sums in found["losses"]]).sum(dim=0)
    return {**first, "tokens": counts}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_an_experts_gradient_is_divided_by_the_tokens_of_its_own_rows(
    tmp_path: Path, base: str, accumulated: int
) -> None:
    both = []
    for name, settings in (("batch", FAST), ("use", USED)):
        make = partial(mixture, base, ByTask(), optimization=settings)
        uneven = partial(made, make, tmp_path, rows=(9, 3))
        both.append(gradients(tmp_path / name, uneven, accumulate_grad_batches=accumulated))
    plain, own = both
    tokens = plain["tokens"]
    assert tokens[0] != tokens[1]
    for name in plain.keys() - {"tokens"}:
        factors = tokens.sum() / tokens.repeat_interleave(2) if "expert_" in name else torch.ones(1)
        torch.testing.assert_close(own[name], plain[name] * factors.unsqueeze(1))


@pytest.mark.parametrize("router", [Constant(), Poly(heads=2)], ids=["constant", "poly"])
def test_where_all_rows_use_all_experts_nothing_changes(tmp_path: Path, base: str, router: RouterSpec) -> None:
    both = [
        gradients(tmp_path / name, partial(made, partial(mixture, base, router, optimization=settings), tmp_path))
        for name, settings in (("batch", FAST), ("use", USED))
    ]
    for name, gradient in both[0].items():
        torch.testing.assert_close(both[1][name], gradient)


@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_a_row_counts_by_the_share_of_its_own_inputs(scope: str) -> None:
    """Row 0 has two pictures, row 1 none, and is padded."""
    base = models.tiny_llava()
    experts = {name: LoRA(rank=2) for name in ("a", "b", "c")}
    found = moadapt.attach(base, experts=experts, router=TopK(k=1, scope=scope), placement=TOWERS)
    models.randomize(found)
    batch = models.uneven_images(models.prompt_of(models.llava_batch()))
    with found.observe() as observed, torch.no_grad():
        found(**batch)
    counts = torch.tensor([3.0, 5.0, 7.0])
    use = ExpertUse(found)
    use.add(observed, counts)
    assert use.counts is not None
    owners = {"vision": torch.tensor([0, 0, 2]), "language": torch.arange(3)}
    for place, counted in zip(found.places, use.counts, strict=True):
        [each] = [each for each in observed if each.place == place.name]
        weights = each.routing.dense()[:, :, 0]
        real = batch["attention_mask"].bool() if place.tower == "language" else torch.ones(weights.shape[:2]).bool()
        expected = torch.zeros(3)
        for row, count in enumerate(counts):
            own = owners[place.tower] == row if scope == "token" else torch.arange(3) == row
            if scope == "token":
                inputs = weights[own][real[own]]
            else:
                inputs = weights[own, 0] if place.tower == "language" or row != 1 else weights[:0, 0]
            expected += count * (inputs != 0).float().sum(0) / max(1, len(inputs))
        torch.testing.assert_close(counted, expected)


@pytest.mark.parametrize("router", [ByTask(), TopK(k=2, scope="token"), TopK(k=1)], ids=["task", "top2-token", "top1"])
def test_two_processes_count_as_one(
    tmp_path: Path, base: str, router: RouterSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MixedOrder", TaskByTask)
    make = partial(half_blind, partial(mixture, base, router, placement=TOWERS, optimization=USED), tmp_path)
    [one] = fit(tmp_path / "one", make, 1, **EXACT, accumulate_grad_batches=2)
    two = fit(tmp_path / "two", make, 2, **EXACT, accumulate_grad_batches=2)
    assert_same(two, one, 1e-6)


def test_another_mean_is_refused() -> None:
    with pytest.raises(ValueError, match="expert_mean is 'rows'; give batch or use"):
        Optimization(expert_mean="rows")  # type: ignore[arg-type]
