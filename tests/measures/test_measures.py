"""Measures of routing against what is known of hand-made routings."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from moadapt.measures import (
    DeadExperts,
    Drift,
    DroppedTokens,
    EffectiveExperts,
    InputInformation,
    Load,
    ModalityLoad,
    RoutingEntropy,
    TaskInformation,
    TaskLoad,
    row_shares,
)
from moadapt.routed import Routed, routed_at
from moadapt.router import RoutingContext
from moadapt.routing import Routing
from moadapt.tracing import Observation

E = 4
LN = math.log(E)
EVEN, COLLAPSED, SPECIALISED = torch.full((8, E), 1 / E), torch.eye(E)[[1] * 8], torch.eye(E)[[0, 0, 1, 1, 2, 2, 3, 3]]


def rows(weights: Tensor, tasks: Sequence[int] | None = None, num_tasks: int = 2) -> Routed:
    """Rows that got these weights, (N, E)."""
    seen = RoutingContext(task_ids=None if tasks is None else torch.tensor(tasks))
    return routed_at(Observation("here", Routing(weights.reshape(-1, 1, 1, E), E), seen), "abcd", "stuv"[:num_tasks])


def measured(metric: Metric, *routed: Routed) -> list[float]:
    for each in routed:
        metric.update(each)
    found: list[float] = metric.compute().tolist()
    return found


@pytest.mark.parametrize(
    ("metric", "even", "collapsed", "specialised"),
    [
        (Load(E), [1 / E] * E, [0, 1, 0, 0], [1 / E] * E),
        (RoutingEntropy(), LN, 0, 0),
        (EffectiveExperts(), E, 1, 1),
        (DeadExperts(E), 0, 3 / 4, 0),
        (InputInformation(E), 0, 0, LN),
        (DroppedTokens(), 0, 0, 0),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, Metric) else "",
)
def test_values_where_they_are_known(metric: Metric, even: float, collapsed: float, specialised: float) -> None:
    for weights, expected in ((EVEN, even), (COLLAPSED, collapsed), (SPECIALISED, specialised)):
        metric.reset()
        assert measured(metric, rows(weights)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "metric",
    [Load(E), RoutingEntropy(), EffectiveExperts(), InputInformation(E), TaskInformation(2, E), TaskLoad(2, E)],
    ids=lambda metric: type(metric).__name__,
)  # fmt: skip
def test_parts_add_up_and_scale_does_not_matter(metric: Metric) -> None:
    weights, tasks = torch.rand(10, E, generator=torch.Generator().manual_seed(1)), [0, 1, 1, 0, 1, 1, 1, 0, 0, 1]
    whole = torch.tensor(measured(metric, rows(weights, tasks)))
    metric.reset()
    parts = measured(metric, rows(3 * weights[:3], tasks[:3]), rows(-weights[3:], tasks[3:]))
    assert torch.allclose(torch.tensor(parts), whole, atol=1e-6)


def test_an_effective_number_counts_small_weights_little() -> None:
    weights = torch.tensor([[0.8, 0.2, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert measured(EffectiveExperts(), rows(weights)) == pytest.approx((1 / (0.64 + 0.04) + 0) / 2)


def test_experts_below_a_part_of_an_even_split_are_dead() -> None:
    weights = torch.tensor([[0.5, 0.44, 0.04, 0.02]])  # of an even split 2, 1.76, 0.16, 0.08
    assert measured(DeadExperts(E), rows(weights)) == pytest.approx(1 / 4)
    assert measured(DeadExperts(E, below=0.2), rows(weights)) == pytest.approx(2 / 4)


def test_tasks_count_alike_in_what_they_tell() -> None:
    weights, tasks = torch.eye(E)[[0, 0, 0, 1]], [0, 0, 0, 1]
    assert measured(TaskInformation(2, E), rows(weights, tasks)) == pytest.approx(math.log(2))
    assert measured(TaskInformation(2, E), rows(EVEN, [0, 1] * 4)) == pytest.approx(0, abs=1e-6)
    assert measured(TaskInformation(3, E), rows(weights, tasks, num_tasks=3)) == pytest.approx(math.log(2))
    assert measured(TaskLoad(2, E), rows(weights, tasks)) == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert math.isnan(measured(TaskLoad(3, E), rows(weights, tasks, num_tasks=3))[2][0])


def test_tokens_that_are_no_prompt_count_nowhere_and_modalities_apart() -> None:
    weights = torch.eye(E)[[0, 1, 2, 3]].reshape(1, E, 1, E)
    prompt, image = torch.tensor([[False, True, True, True]]), torch.tensor([[False, False, True, True]])
    routed = routed_at(Observation("here", Routing(weights, E), RoutingContext(prompt=prompt, image=image)), "abcd", "")
    assert measured(Load(E), routed) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    assert measured(ModalityLoad(E), routed) == [[0, 1, 0, 0], [0, 0, 0.5, 0.5]]
    assert torch.allclose(row_shares(routed, 1), torch.tensor([[0, 1 / 3, 1 / 3, 1 / 3]]))


def test_choices_of_weight_nothing_are_dropped() -> None:
    weights, indices = torch.tensor([[0.7, 0.3], [0.0, 1.0]]), torch.tensor([[0, 1], [1, 2]])
    routing = Routing(weights.view(2, 1, 1, 2), E, indices.view(2, 1, 1, 2))
    assert measured(DroppedTokens(), routed_at(Observation("here", routing, RoutingContext()), "abcd", "")) == 0.25


def test_drift_is_what_moved() -> None:
    before, after = rows(torch.eye(E)[[0, 1]]), rows(torch.tensor([[1.0, 0, 0, 0], [0, 0.25, 0.75, 0]]))
    drift = Drift()
    drift.update(row_shares(before, 2), row_shares(after, 2))
    assert drift.compute().item() == pytest.approx((0 + 0.75) / 2)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize(
    "metric",
    [Load(E), RoutingEntropy(), EffectiveExperts(), DeadExperts(E), InputInformation(E), TaskInformation(2, E),
     TaskLoad(2, E), ModalityLoad(E), DroppedTokens(), Drift()],
    ids=lambda metric: type(metric).__name__,
)  # fmt: skip
def test_nothing_measured_is_no_number(metric: Metric) -> None:
    assert metric.compute().isnan().all()
