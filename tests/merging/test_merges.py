"""Merges: exact where they say so, and otherwise as far off as they say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import moadapt
from moadapt import Placement
from moadapt.adapters import LoRA
from moadapt.merging import MergeRefusedError
from moadapt.mixture import Mixture
from moadapt.routing import RouterSpec
from moadapt_routers import ByTask, Constant, Softmax, TopK
from tests.models import llava_batch, randomize, tiny_llava

TASKS = ["vqa", "captioning", "grounding"]
INPUT_ROUTERS = [Softmax(), TopK(k=2), Softmax(scope="token"), Softmax(per="tower")]


def attached(router: RouterSpec) -> Mixture:
    mixture = moadapt.attach(
        tiny_llava(),
        shared=LoRA(rank=4),
        experts={
            "vqa": LoRA(rank=3),
            "captioning": LoRA(rank=5, alpha=10),
            "grounding": LoRA(rank=2, placement=Placement(depth=(0.5, 1.0))),
        },
        router=router,
    )
    randomize(mixture, 0.1)
    return mixture


def batches(count: int) -> list[dict[str, Any]]:
    return [{**llava_batch(rows=6, seed=seed), "task": TASKS * 2} for seed in range(count)]


def inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "task"}


@pytest.mark.parametrize("task", TASKS)
def test_task_merge_by_task_is_exact(task: str) -> None:
    mixture, batch = attached(ByTask()), inputs(batches(1)[0])
    plain, report = mixture.merge("task", task=task)
    assert report.exact
    assert report.worst == 0
    torch.testing.assert_close(plain(**batch).logits, mixture(**batch, task=task).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["task", "mean_routing"])
def test_merge_of_constant_weights_is_exact(method: str) -> None:
    mixture, batch = attached(Constant(weights=(0.5, 0.2, 0.3))), inputs(batches(1)[0])
    options = {"task": "vqa"} if method == "task" else {}
    plain, report = mixture.merge(method, **options, **({"calibration": batch} if method != "task" else {}))
    assert report.exact
    torch.testing.assert_close(plain(**batch).logits, mixture(**batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("router", INPUT_ROUTERS, ids=str)
def test_merge_of_input_routing_reports_the_error_of_every_site(router: RouterSpec) -> None:
    mixture, rows = attached(router), batches(2)
    _, report = mixture.merge("mean_routing", calibration=rows)
    assert not report.exact
    assert report.held_out
    assert report.output_kl is not None
    assert report.output_kl >= 0
    expected = brute_force_errors(mixture, rows[:1])
    assert report.sites.keys() == expected.keys()
    for path, error in expected.items():
        assert report.sites[path] == pytest.approx(error, rel=1e-3, abs=1e-5), path


def brute_force_errors(mixture: Mixture, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Form every routed and merged change as a matrix and compare them."""
    with torch.no_grad(), mixture.trace() as trace:
        for batch in rows:
            mixture(**batch)
    place_of = {path: place.name for place in mixture.places for path in place.sites}
    errors = {}
    for site, bank in mixture.banks():
        weights = torch.cat([w.reshape(-1, w.shape[-1]) for w in trace.routings[place_of[site.path]]])
        merged = bank.delta(weights.mean(dim=0)).weight()
        routed = [bank.delta(row).weight() for row in weights]
        apart = sum(float((one - merged).square().sum()) for one in routed)
        errors[site.path] = (apart / sum(float(one.square().sum()) for one in routed)) ** 0.5
    return errors


def test_merge_past_the_bound_is_refused() -> None:
    with pytest.raises(MergeRefusedError, match=r"relative errors pass 0\.001.*model\.language_model"):
        attached(Softmax()).merge("mean_routing", calibration=batches(2), max_error=0.001)


def test_task_merge_of_input_routing_needs_calibration_of_that_task() -> None:
    mixture = attached(TopK(k=2))
    with pytest.raises(ValueError, match="calibration="):
        mixture.merge("task", task="vqa")
    others = [{**llava_batch(rows=2), "task": ["captioning", "grounding"]}]
    with pytest.raises(ValueError, match="no row of task 'vqa'"):
        mixture.merge("task", task="vqa", calibration=others)


def test_mixture_stays_usable_after_a_merge() -> None:
    mixture, batch = attached(Softmax()), inputs(batches(1)[0])
    before = mixture(**batch).logits
    plain, _ = mixture.merge("mean_routing", calibration=batches(2))
    assert torch.equal(mixture(**batch).logits, before)
    assert not any("moadapt" in type(module).__module__ for module in plain.modules())
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_merged_model_reloads_as_a_transformers_checkpoint(tmp_path: Path) -> None:
    mixture, batch = attached(ByTask()), inputs(batches(1)[0])
    plain, _ = mixture.merge("task", task="vqa")
    plain.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, plain(**batch).logits)
