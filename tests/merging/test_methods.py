"""Every merge method of the registry: what holds for all of them."""

import json
from typing import Any

import pytest
import torch

from moadapt.adapters.lora_bank import LoRABank
from moadapt.merging import MergeRefusedError
from moadapt.mixture import Mixture
from moadapt.registry import MERGES
from moadapt_routers import ByTask, Constant
from tests.merging.planted import TASKS, WHOLE, change_of, changes, method_of, mixture_of, rows_of

SHORT = {"steps": 8}
SERVES_ONE = {"task"}


def tasks_for(name: str) -> tuple[str, ...]:
    return TASKS[:1] if name in SERVES_ONE else ()


def inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "task"}


@pytest.mark.parametrize("name", MERGES.names())
def test_a_merge_gives_the_base_with_the_changes_that_it_says(name: str) -> None:
    mixture, rows, method = mixture_of(*TASKS), rows_of(*TASKS), method_of(name, **SHORT)
    found = changes(method, mixture, only(rows[:1], tasks_for(name) or TASKS), tasks_for(name))
    merged, report = mixture.merge(method, calibration=rows, tasks=tasks_for(name))
    base = mixture.detach()
    for path, deltas in found.items():
        expected = base.get_submodule(path).weight.double() + change_of(deltas)
        torch.testing.assert_close(merged.get_submodule(path).weight.double(), expected, rtol=1e-5, atol=1e-5)
    assert json.loads(report.to_json())["method"] == name
    assert not report.exact
    assert "Softmax" in report.why
    assert 0 < report.worst < float("inf")
    assert report.outputs.keys() == report.held_out_outputs.keys() == report.sites.keys()
    assert report.held_out
    assert report.top1 is not None
    assert 0 <= report.top1 <= 1


@pytest.mark.parametrize("name", sorted(set(MERGES.names()) - {"lorahub"}))
def test_one_expert_of_weight_one_is_merged_exactly(name: str) -> None:
    """But for a search, which finds weights of its own."""
    mixture, rows = mixture_of("vqa", router=Constant(weights=(1.0,))), rows_of("vqa", rows=12)
    method = method_of(name, **WHOLE)
    merged, report = mixture.merge(method, calibration=rows[:1], tasks=("vqa",))
    expected = mixture(**rows[0]).logits
    torch.testing.assert_close(merged(**inputs(rows[0])).logits, expected, rtol=1e-5, atol=1e-4)
    if name != "regmean":  # which knows nothing of directions without inputs
        assert report.exact
        assert report.worst == 0


@pytest.mark.parametrize("name", MERGES.names())
def test_the_basis_of_factors_does_not_matter(name: str) -> None:
    """With any invertible R, factors `R A` and `B R^-1` are the same adapter."""
    mixture, rows, method = mixture_of(*TASKS), rows_of(*TASKS), method_of(name, **SHORT)
    if name == "distillation":
        pytest.skip("an optimiser's path depends on the factors that it moves")
    before = changes(method, mixture, rows[:1], tasks_for(name))
    change_basis(mixture)
    for path, deltas in changes(method, mixture, rows[:1], tasks_for(name)).items():
        torch.testing.assert_close(change_of(deltas), change_of(before[path]), rtol=1e-3, atol=1e-4)


def change_basis(mixture: Mixture) -> None:
    generator = torch.Generator().manual_seed(11)
    for _, bank in mixture.banks():
        assert isinstance(bank, LoRABank)
        for adapter in bank.names:
            state = bank.state(adapter)
            rank = len(state["down"])
            basis = torch.eye(rank) + 0.3 * torch.randn(rank, rank, generator=generator)
            bank.load_state(adapter, {"down": basis @ state["down"], "up": torch.linalg.inv(basis).T @ state["up"]})


@pytest.mark.parametrize("name", sorted(set(MERGES.names()) - {"lorahub", "task", "distillation"}))
def test_a_merge_for_some_tasks_is_that_of_their_experts_where_no_router_is_asked(name: str) -> None:
    mixture, rows, method = mixture_of(*TASKS, router=ByTask()), rows_of(*TASKS), method_of(name, **SHORT)
    before = changes(method, mixture, only(rows, TASKS[:2]), TASKS[:2])
    for _, bank in mixture.banks():
        bank.load_state(TASKS[2], {part: 2 * tensor for part, tensor in bank.state(TASKS[2]).items()})
    for path, deltas in changes(method, mixture, only(rows, TASKS[:2]), TASKS[:2]).items():
        torch.testing.assert_close(change_of(deltas), change_of(before[path]), rtol=1e-4, atol=1e-5)


def only(rows: list[dict[str, Any]], tasks: Any) -> list[dict[str, Any]]:
    found = []
    for batch in rows:
        kept = [i for i, task in enumerate(batch["task"]) if task in tasks]
        found.append({k: [v[i] for i in kept] if k == "task" else v[kept] for k, v in batch.items()})
    return found


@pytest.mark.parametrize("name", MERGES.names())
def test_a_merge_past_its_bound_writes_nothing(name: str, tmp_path: Any) -> None:
    mixture, rows = mixture_of(*TASKS), rows_of(*TASKS)
    options = {"calibration": rows, "tasks": tasks_for(name), "rank": 4, "max_error": 1e-5}
    with pytest.raises(MergeRefusedError, match=r"relative errors pass 1e-05"):
        mixture.export_peft(tmp_path / "lora", method=method_of(name, **SHORT), **options)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("name", MERGES.names())
def test_a_merge_that_looks_at_rows_says_so_without_them(name: str) -> None:
    mixture, part = mixture_of(*TASKS), MERGES.get(name)
    if part.always_reads_rows or part.reads_rows:
        with pytest.raises(ValueError, match=f"merge '{name}' .*give calibration="):
            mixture.merge(method_of(name), tasks=tasks_for(name))
    else:
        _, report = mixture.merge(name)
        assert not report.exact
        assert report.sites == {}
        with pytest.raises(ValueError, match="max_error needs calibration="):
            mixture.merge(name, max_error=0.5)
