"""What each balance method does, against the vectors or the numbers that its definition gives."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from moadapt.balancing import CAGrad, DynamicAverage, Fixed, GradNorm, PCGrad, Uncertainty, cagrad
from moadapt.balancing.cagrad import averse
from moadapt.balancing.gradnorm import moved_weights
from moadapt.balancing.pcgrad import projected
from moadapt.registry import BALANCES

TASKS = ("ask", "tell", "find", "count")


def gradients(seed: int, tasks: int = 4, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tasks, width, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("seed", range(5))
def test_projections_are_those_of_the_vectors(seed: int) -> None:
    found, orders = gradients(seed), [torch.randperm(4).tolist() for _ in range(4)]
    expected = []
    for own, order in enumerate(orders):
        left = found[own].clone()
        for other in order:
            if other != own and left @ found[other] < 0:
                left -= (left @ found[other]) / (found[other] @ found[other]) * found[other]
        expected.append(left)
    torch.testing.assert_close(projected(found @ found.T, orders) @ found, torch.stack(expected))


def test_two_tasks_after_projection_harm_neither() -> None:
    found = gradients(0, tasks=2)
    found[1] = -0.1 * found[0] + 0.05 * found[1]
    products = found @ found.T
    assert products[0, 1] < 0
    step = PCGrad().build(TASKS[:2], 0).combine(products, 3) @ found
    assert (found.sum(dim=0) @ found.T).min() < 0
    assert (step @ found.T).min() > 0


def test_orders_are_a_function_of_seed_and_step() -> None:
    products = gradients(1) @ gradients(1).T
    balancer = PCGrad().build(TASKS, 5)
    steps = [balancer.combine(products, step) for step in range(6)]
    assert any(not torch.equal(a, b) for a, b in pairwise(steps))
    assert all(torch.equal(PCGrad().build(TASKS, 5).combine(products, s), found) for s, found in enumerate(steps))


@pytest.mark.parametrize("method", [PCGrad(), CAGrad(c=0.5)], ids=["pcgrad", "cagrad"])
def test_gradients_that_agree_are_added(method: PCGrad | CAGrad) -> None:
    one = gradients(2, tasks=1)
    found = torch.tensor([[1.0], [2.0], [0.0], [3.0]], dtype=torch.float64) @ one
    step = method.build(TASKS, 0).combine(found @ found.T, 0) @ found
    scale = step / found.sum(dim=0)
    torch.testing.assert_close(scale, torch.ones_like(scale))


@pytest.mark.parametrize("method", [PCGrad(), CAGrad()], ids=["pcgrad", "cagrad"])
def test_a_task_without_rows_changes_nothing(method: PCGrad | CAGrad) -> None:
    found = gradients(3, tasks=3)
    found[2] = 0
    three = method.build(TASKS[:3], 0).combine(found @ found.T, 0)
    two = method.build(TASKS[:2], 0).combine(found[:2] @ found[:2].T, 0)
    torch.testing.assert_close(three @ found, two @ found[:2], rtol=1e-5, atol=1e-8)
    none = torch.zeros(3, 3, dtype=torch.float64)
    assert method.build(TASKS[:3], 0).combine(none, 0).isfinite().all()


@pytest.mark.parametrize("c", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_no_step_as_near_the_mean_helps_the_worst_off_task_more(seed: int, c: float) -> None:
    found = gradients(seed, tasks=3, width=3)
    mean = found.mean(dim=0)
    step = averse(found @ found.T, c) @ found * (1 + c) / 3
    reach = c * mean.norm()
    assert (step - mean).norm() <= reach * (1 + 1e-6)
    rival = torch.nn.functional.normalize(gradients(seed + 50, tasks=20_000, width=3), dim=1) * reach + mean
    assert (found @ step).min() >= (rival @ found.T).amin(dim=1).max() - 1e-6


@pytest.mark.parametrize("success", [False, True])
def test_shares_add_up_to_one_and_are_no_worse_than_equal_ones(success: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found, mean = torch.diag(torch.tensor([1.0, 0.1], dtype=torch.float64)), torch.full((2,), 0.5, dtype=torch.float64)
    stopped = SimpleNamespace(x=np.array([1.2, -0.1]), success=success)
    monkeypatch.setattr(cagrad, "minimize", lambda *args, **kwargs: stopped)
    shares = cagrad.worst_shares(found, mean, torch.tensor(0.2, dtype=torch.float64))
    assert shares.tolist() == ([1.0, 0.0] if success else [0.5, 0.5])


def test_no_reach_is_the_plain_sum() -> None:
    found = gradients(4)
    torch.testing.assert_close(averse(found @ found.T, 0.0), torch.ones(4, dtype=torch.float64))


def test_opposed_gradients_that_cancel_give_no_wild_step() -> None:
    found = gradients(5, tasks=2)
    found[1] = -3 * found[0] + 1e-9 * found[1]
    shares = CAGrad(c=0.9).build(TASKS[:2], 0).combine(found @ found.T, 0)
    assert (shares @ found).norm() <= 2 * found.sum(dim=0).norm()


def test_a_slower_task_gets_more_weight() -> None:
    balancer = DynamicAverage(every=2, temperature=2.0).build(TASKS[:3], 0)
    counts = torch.tensor([2.0, 4.0, 0.0])
    for means in ([1.0, 3.0], [1.0, 5.0], [0.25, 4.0], [0.75, 4.0]):  # two stretches of two batches
        assert balancer.weights().tolist() == [1.0, 1.0, 1.0]
        balancer.observe(torch.tensor([*means, 0.0]) * counts, counts)
        balancer.step()
    ratios = torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64)  # one task fell by half, one stood, one was not there
    torch.testing.assert_close(balancer.weights(), 3 * torch.softmax(ratios / 2, dim=0))


def test_weights_make_gradients_equally_large() -> None:
    sizes = torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64)
    balancer, counts = GradNorm(alpha=0.0).build(TASKS[:3], 0), torch.ones(3)
    for _ in range(400):
        balancer.observe(torch.ones(3), counts)
        norms = balancer.weights() * sizes
        balancer.step(torch.diag(norms**2))
    torch.testing.assert_close(balancer.weights() * sizes, (3 / (1 / sizes).sum()).expand(3), rtol=0.1, atol=0)
    torch.testing.assert_close(balancer.weights().sum(), torch.tensor(3.0, dtype=torch.float64))


def test_weights_stay_in_bounds_and_those_of_absent_tasks_stay() -> None:
    balancer = GradNorm(alpha=0.0, learning_rate=0.5).build(TASKS[:3], 0)
    norms = torch.tensor([1e9, 1.0, 0.0], dtype=torch.float64)
    for _ in range(40):
        balancer.observe(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0]))
        balancer.step(torch.diag((balancer.weights() * norms) ** 2))
    torch.testing.assert_close(balancer.weights(), torch.tensor([0.01, 1.99, 1.0], dtype=torch.float64))


def test_slow_tasks_are_pulled_more() -> None:
    norms, progress = torch.ones(2, dtype=torch.float64), torch.tensor([0.5, 1.5], dtype=torch.float64)
    moved = moved_weights(torch.ones(2, dtype=torch.float64), norms, progress, GradNorm(alpha=1.0, learning_rate=0.1))
    torch.testing.assert_close(moved, torch.tensor([-0.1, 0.1], dtype=torch.float64).exp())


def test_a_task_alone_in_a_step_leaves_the_weights() -> None:
    balancer = GradNorm().build(TASKS[:2], 0)
    balancer.observe(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    balancer.step(torch.diag(torch.tensor([4.0, 0.0], dtype=torch.float64)))
    assert balancer.weights().tolist() == [1.0, 1.0]


def test_variances_settle_where_every_weighted_loss_is_a_half() -> None:
    losses, balancer = torch.tensor([8.0, 2.0, 0.25, 1.0]).double(), Uncertainty().build(TASKS, 0)
    optimizer = torch.optim.Adam(balancer.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        (losses * balancer.weights() + balancer.offsets()).sum().backward()
        optimizer.step()
    torch.testing.assert_close(losses * balancer.weights(), torch.full((4,), 0.5).double(), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Fixed(weights={"ask": -1.0}), "0 or more"),
        (lambda: Fixed(weights={"asks": 1.0}).build(TASKS, 0), "ask, tell"),
        (lambda: Fixed(weights=dict.fromkeys(TASKS, 0.0)).build(TASKS, 0), "more than 0"),
        (lambda: CAGrad(c=1.0), "below 1"),
        (lambda: GradNorm(alpha=-1.0), "at least 0"),
        (lambda: GradNorm(learning_rate=0.0), "more than 0"),
        (lambda: DynamicAverage(every=0), "at least 1"),
        (lambda: DynamicAverage(temperature=0.0), "more than 0"),
        (lambda: Uncertainty(learning_rate=float("nan")), "more than 0"),
    ],
)
def test_settings_out_of_range_are_refused(make: object, word: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=word):
        make()


@pytest.mark.parametrize("name", BALANCES.names())
def test_a_cast_leaves_state_as_it_is(name: str) -> None:
    balancer = BALANCES.get(name)().build(TASKS, 0)
    for tensor in (*balancer.parameters(), *balancer.buffers()):
        tensor.data.add_(1 if tensor.dtype == torch.int64 else 1 / 3)
    before = {key: tensor.clone() for key, tensor in balancer.named_buffers()} | dict(balancer.named_parameters())
    before = {key: tensor.detach().clone() for key, tensor in before.items()}
    torch.nn.ModuleList([balancer]).to(torch.bfloat16).half().float()
    for key, tensor in (*balancer.named_buffers(), *balancer.named_parameters()):
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("name", BALANCES.names())
def test_a_dropped_step_leaves_no_trace_and_batches_of_a_step_count_as_one(name: str) -> None:
    found, counts = gradients(0), torch.tensor([2.0, 4.0, 1.0, 3.0])
    plain, other = (BALANCES.get(name)().build(TASKS, 0) for _ in range(2))
    for scale in (1.0, 2.0):
        plain.observe(scale * counts, counts)
        plain.step(found @ found.T)
        other.observe(torch.full((4,), torch.nan), counts)
        other.step(found @ found.T)
        other.observe(9 * counts, counts)
        other.drop()
        weights = other.weights().clone()
        for _ in range(2):
            other.observe(scale * counts / 2, counts / 2)
            assert torch.equal(other.weights(), weights)
        other.step(found @ found.T)
    for ours, theirs in zip(other.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", BALANCES.names())
def test_state_is_all_that_going_on_needs(name: str) -> None:
    spec = BALANCES.get(name)()

    def go_on(balancer: torch.nn.Module, first: int) -> list[Tensor]:
        told = []
        for step in range(first, first + 3):
            generator = torch.Generator().manual_seed(step)
            losses, found = torch.rand(4, generator=generator), gradients(step)
            balancer.observe(losses, torch.ones(4))
            told += [balancer.weights().detach().clone(), balancer.combine(found @ found.T, step)]
            balancer.step(found @ found.T)
        return told

    one, other = spec.build(TASKS, 7), spec.build(TASKS, 7)
    go_on(one, 0)
    other.load_state_dict({key: value.clone() for key, value in one.state_dict().items()})
    for ours, theirs in zip(go_on(one, 3), go_on(other, 3), strict=True):
        assert torch.equal(ours, theirs)
