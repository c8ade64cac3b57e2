"""Merges from statistics of inputs: they are what brute force finds, each as near on its rows as the one before."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt.merging.statistics import adapters_of, site_statistics
from moadapt.mixture import Mixture
from moadapt.tracing import SiteObservation
from moadapt_routers import Softmax
from tests.merging.planted import TASKS, change_of, changes, method_of, mixture_of, rows_of
from tests.models import padded

ORDER = ("regression", "least_squares", "mean_routing")


def seen_of(mixture: Mixture, rows: list[dict[str, Any]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Real inputs (N, D) and weights (N, E) of every site, in float64."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for batch in rows:

        def note(seen: SiteObservation, batch: dict[str, Any] = batch) -> None:
            assert seen.routing is not None
            weights = seen.routing.dense()[:, :, 0].expand(*seen.x.shape[:2], -1)
            real = batch["attention_mask"].bool()
            found.setdefault(seen.site.path, []).append((seen.x[real].double(), weights[real].double()))

        with torch.no_grad(), mixture.watch_sites(note):
            mixture(**batch)
    return {path: (torch.cat([x for x, _ in all]), torch.cat([w for _, w in all])) for path, all in found.items()}


def routed(own: list[Tensor], x: Tensor, weights: Tensor) -> Tensor:
    """What the experts add, (N, F)."""
    total: Tensor = sum(weights[:, [e]] * (x @ change.T) for e, change in enumerate(own))
    return total


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("name", ["least_squares", "regression"])
def test_closed_forms_are_what_brute_force_finds(name: str, scope: Any) -> None:
    """With padding, whose tokens must not count."""
    mixture = mixture_of(*TASKS, router=Softmax(scope=scope))
    rows = [{**padded(batch, 3, "left"), "task": batch["task"]} for batch in rows_of(*TASKS, count=3, rows=12)]
    found, seen = changes(method_of(name, ridge=0.0), mixture, rows), seen_of(mixture, rows)
    for at in adapters_of(mixture):
        x, weights = seen[at.site.path]
        own = [change_of([each]) for each in at.own]
        wanted = routed(own, x, weights)
        if name == "regression":
            assert torch.linalg.matrix_rank(x) == x.shape[1], "there are inputs in every direction"
            expected = torch.linalg.lstsq(x, wanted).solution.T
        else:
            columns = torch.stack([(x @ change.T).flatten() for change in own], dim=1)
            best = torch.linalg.lstsq(columns, wanted.flatten().unsqueeze(1)).solution.flatten()
            expected = sum(best[e] * change for e, change in enumerate(own))
        torch.testing.assert_close(
            change_of(found[at.site.path]), change_of([at.shared]) + expected, rtol=2e-3, atol=2e-4
        )


def test_each_is_as_near_on_its_own_rows_as_the_one_before() -> None:
    mixture, rows = mixture_of(*TASKS), rows_of(*TASKS, count=1)
    errors = [mixture.merge(method_of(name, ridge=1e-6), calibration=rows)[1].outputs for name in ORDER]
    for path in errors[0]:
        regression, least_squares, mean = (each[path] for each in errors)
        assert regression <= least_squares + 1e-6
        assert least_squares <= mean + 1e-6
        assert regression < 0.95 * mean, path


def test_the_error_of_outputs_is_measured_and_not_estimated() -> None:
    mixture, rows = mixture_of(*TASKS), rows_of(*TASKS, count=2)
    _, report = mixture.merge("regression", calibration=rows)
    found = changes(method_of("regression"), mixture, rows[:1])
    for part, used in ((report.outputs, rows[:1]), (report.held_out_outputs, rows[1:])):
        seen = seen_of(mixture, used)
        for at in adapters_of(mixture):
            x, weights = seen[at.site.path]
            whole = routed([change_of([each]) for each in at.own], x, weights) + x @ change_of([at.shared]).T
            apart = whole - x @ change_of(found[at.site.path]).T
            assert part[at.site.path] == pytest.approx(float(apart.norm() / whole.norm()), rel=1e-3)


@pytest.mark.parametrize("rows", [1, 40])
def test_with_few_rows_the_order_turns_on_others_unless_a_ridge_holds_it(rows: int) -> None:
    mixture = mixture_of(*TASKS)
    used, others = rows_of(*TASKS, count=1, rows=rows)[0], rows_of(*TASKS, count=2, rows=24)[1]

    def held_out(name: str, **options: float) -> float:
        _, report = mixture.merge(method_of(name, **options), calibration=[used, others])
        return sum(report.held_out_outputs.values()) / len(report.held_out_outputs)

    free, held, least = held_out("regression", ridge=1e-6), held_out("regression", ridge=1.0), held_out("least_squares")
    if rows == 1:  # 13 tokens for 32 features
        assert free > least
        assert held < free
    else:
        assert free < 0.95 * least


def test_nothing_wider_than_the_inputs_is_kept() -> None:
    mixture, rows = mixture_of(*TASKS), rows_of(*TASKS, count=1)
    ranks = 2 + 3 + 4
    for with_inputs in (False, True):
        for found in site_statistics(mixture, rows, with_inputs=with_inputs).values():
            width = found.terms.down.shape[1]
            kept = [t.shape for t in vars(found).values() if isinstance(t, Tensor)]
            wide = [(2, ranks, width), (width, width)] if with_inputs else []
            assert sorted(kept) == sorted([(ranks, ranks)] * 3 + wide)
    by_block = site_statistics(mixture, rows, with_inputs=True)
    q, k = (by_block[f"model.language_model.layers.0.self_attn.{name}_proj"].inputs for name in "qk")
    assert q is not None
    assert k is not None
    assert torch.equal(q, k)


def test_regmean_does_on_each_tasks_inputs_what_its_expert_does() -> None:
    """As far as one map can: the closed form against least squares over the rows of all tasks."""
    mixture, rows = mixture_of(*TASKS, shared=False), rows_of(*TASKS, count=3, rows=24)
    found = changes(method_of("regmean", shrinkage=1.0), mixture, rows)
    at = adapters_of(mixture)[0]
    inputs, outputs = [], []
    for expert, task in enumerate(TASKS):
        mine = [
            {k: v[[i for i, t in enumerate(b["task"]) if t == task]] for k, v in b.items() if k != "task"} for b in rows
        ]
        with mixture.override({task: 1.0}):
            x, _ = seen_of(mixture, mine)[at.site.path]
        inputs.append(x / len(x) ** 0.5)
        outputs.append(inputs[-1] @ change_of([at.own[expert]]).T)
    expected = torch.linalg.lstsq(torch.cat(inputs), torch.cat(outputs)).solution.T
    torch.testing.assert_close(change_of(found[at.site.path]), expected, rtol=1e-2, atol=1e-3)
