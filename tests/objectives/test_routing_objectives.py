"""Objectives on routings: their values where these are known, and which way a few steps of descent move a router."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt.adapters import LoRA
from moadapt.attaching import attach
from moadapt.objectives import (
    Entropy,
    Importance,
    LoadBalance,
    MutualInformation,
    Prior,
    RoutingObjective,
    Sparsity,
    TaskCrossEntropy,
    ZLoss,
)
from moadapt.routed import Routed, entropy, routed_at
from moadapt.router import RoutingContext
from moadapt.routing import Routing
from moadapt.tracing import Observation
from moadapt_routers import ByTask, Softmax, TopK
from tests.models import tiny_llama

EXPERTS = ("a", "b", "c", "d")
E = len(EXPERTS)
SURE = 60.0  # a logit so far above the others that its probability is one


def laid_out(logits: Tensor, tasks: Sequence[int] | None = None) -> Routed:
    """Rows with these logits (N, E), each routed to its best expert with the probability that it has."""
    logits = logits.reshape(-1, 1, 1, E)
    seen = RoutingContext(task_ids=None if tasks is None else torch.tensor(tasks))
    best, indices = logits.softmax(-1).topk(1)
    return routed_at(Observation("here", Routing(best, E, indices, logits=logits), seen), EXPERTS, ("s", "t"))


def value(objective: RoutingObjective, logits: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
    routed = laid_out(logits, tasks)
    return objective.value(objective.sums(routed), routed)


def chosen(*experts: int) -> Tensor:
    """Logits of rows that are sure of these experts."""
    return SURE * torch.nn.functional.one_hot(torch.tensor(experts), E).double()


EVEN, COLLAPSED, SPECIALISED = torch.zeros(8, E).double(), chosen(*[1] * 8), chosen(0, 0, 1, 1, 2, 2, 3, 3)
LN = math.log(E)


@pytest.mark.parametrize(
    ("objective", "even", "collapsed", "specialised"),
    [
        (LoadBalance(), 1, E, 1),
        (Importance(), 0, E - 1, 0),
        (Entropy(), LN, 0, 0),
        (Entropy(direction="spread"), 0, LN, LN),
        (MutualInformation(of="input"), 0, 0, -LN),
        (Prior(), 0, LN, 0),
        (Prior(shares=(1, 5, 1, 1)), -math.log(4) - (3 * math.log(1 / 8) + math.log(5 / 8)) / 4, math.log(8 / 5),
         -math.log(4) - (3 * math.log(1 / 8) + math.log(5 / 8)) / 4),
        (ZLoss(), LN**2, SURE**2, SURE**2),
        (Sparsity(), 1 / E, 1, 1),
    ],
    ids=lambda given: repr(given) if isinstance(given, RoutingObjective) else "",
)  # fmt: skip
def test_values_where_they_are_known(
    objective: RoutingObjective, even: float, collapsed: float, specialised: float
) -> None:
    found = [value(objective, logits).item() for logits in (EVEN, COLLAPSED, SPECIALISED)]
    assert found == pytest.approx([even, collapsed, specialised], abs=1e-9)


def test_information_of_the_task_is_that_of_the_formula() -> None:
    objective, tasks = MutualInformation(), [0, 0, 0, 0, 0, 0, 1, 1]
    assert value(objective, EVEN, tasks).item() == pytest.approx(0, abs=1e-12)
    assert value(objective, COLLAPSED, tasks).item() == pytest.approx(0, abs=1e-12)
    apart = value(objective, chosen(0, 0, 1, 1, 0, 1, 2, 3), tasks).item()
    assert apart == pytest.approx(-entropy(torch.tensor([6 / 8, 2 / 8])).item())  # the expert tells the task
    logits = torch.randn(8, E).double()
    shares = torch.tensor([6 / 8, 2 / 8])
    p = logits.softmax(-1)
    expected = entropy(p.mean(0)) - shares[0] * entropy(p[:6].mean(0)) - shares[1] * entropy(p[6:].mean(0))
    assert value(objective, logits, tasks).item() == pytest.approx(-expected.item())
    assert 0 < expected < LN


@pytest.mark.parametrize(
    ("objective", "grows"),
    [
        (Entropy(direction="sharpen"), {"entropy": False}),
        (Entropy(direction="spread"), {"entropy": True}),
        (Prior(), {"diversity": True}),
        (Importance(), {"diversity": True}),
        (LoadBalance(), {"diversity": True}),
        (MutualInformation(of="input"), {"diversity": True, "entropy": False}),
    ],
    ids=repr,
)
def test_descent_moves_the_right_way(objective: RoutingObjective, grows: dict[str, bool]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(16, E, generator=generator) + torch.tensor([1.0, 0.5, 0, 0])).requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=2.0)

    def measured() -> dict[str, float]:
        p = logits.detach().softmax(-1)
        return {"entropy": entropy(p).mean().item(), "diversity": entropy(p.mean(0)).item()}

    before = measured()
    for _ in range(20):
        optimizer.zero_grad()
        value(objective, logits).backward()
        optimizer.step()
    after = measured()
    assert {name: after[name] > before[name] for name in grows} == grows


def test_information_of_the_task_draws_tasks_apart() -> None:
    logits = (0.1 * torch.randn(16, E, generator=torch.Generator().manual_seed(0))).requires_grad_()
    tasks = [0] * 8 + [1] * 8
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        value(MutualInformation(), logits, tasks).backward()
        optimizer.step()
    p = logits.detach().softmax(-1)
    overlap = torch.minimum(p[:8].mean(0), p[8:].mean(0)).sum()
    assert overlap < 0.05
    assert value(MutualInformation(), logits, tasks).item() == pytest.approx(-math.log(2), abs=0.05)


def test_tasks_are_taught_on_all_real_tokens_of_rows_with_an_expert() -> None:
    """Of three rows, tasks a, none of the experts, and c; prompt and answer count, padding does not."""
    logits = torch.randn(3, 4, 1, E).double()
    real = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]).bool()
    prompt = torch.tensor([[1, 1, 0, 0]] * 3).bool()
    seen = RoutingContext(task_ids=torch.tensor([0, 1, 2]), prompt=prompt, real=real)
    routed = routed_at(
        Observation("here", Routing(logits.softmax(-1), E, logits=logits), seen), EXPERTS, ("a", "x", "c")
    )
    found = TaskCrossEntropy().value(TaskCrossEntropy().sums(routed.with_answers()), routed)
    terms = -logits[:, :, 0].log_softmax(-1)
    expected = torch.cat([terms[0, :3, EXPERTS.index("a")], terms[2, :, EXPERTS.index("c")]]).mean()
    assert found.item() == pytest.approx(expected.item())


def test_gates_are_pushed_to_zero() -> None:
    gates = torch.tensor([[0.5, -0.2, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]]).requires_grad_()
    routed = routed_at(Observation("here", Routing(gates.view(2, 1, 1, E), E), RoutingContext()), EXPERTS, ())
    found = Sparsity().value(Sparsity().sums(routed), routed)
    assert found.item() == pytest.approx((1.7 + 0.4) / 2)
    found.backward()
    assert torch.equal(gates.grad, gates.detach().sign() / 2)


def test_rows_of_an_unknown_task_tell_nothing_of_tasks() -> None:
    known, others = chosen(0, 1), chosen(2, 2)
    expected = value(MutualInformation(), known, [0, 1])
    assert torch.equal(value(MutualInformation(), torch.cat([known, others]), [0, 1, -1, -1]), expected)


@pytest.mark.parametrize(
    ("objective", "router", "experts", "tasks", "message"),
    [
        (LoadBalance(), ByTask(), "ab", "ab", "LoadBalance cannot move ByTask, which has nothing to train"),
        (ZLoss(), ByTask(), "ab", "ab", "give it weight: 0 to measure only"),
        (Entropy(), Softmax(), "a", "ab", "Entropy compares experts, and there is only a"),
        (Sparsity(), TopK(), "abc", "ab", "the weights of TopK add up to 1 for every input"),
        (MutualInformation(), Softmax(), "ab", "s", "the data has only s; give of: input"),
        (TaskCrossEntropy(), Softmax(), "ab", "st", "none of a, b is one of s, t; rename the experts"),
        (
            Prior(shares=(1, 2)),
            Softmax(),
            "abc",
            "ab",
            "Prior got 2 shares for 3 experts; give one for each of a, b, c",
        ),
    ],
    ids=str,
)
def test_mixtures_that_it_makes_no_sense_for_are_refused(
    objective: RoutingObjective, router: Any, experts: str, tasks: str, message: str
) -> None:
    mixture = attach(tiny_llama(), experts={name: LoRA() for name in experts}, router=router)
    with pytest.raises(ValueError, match=message):
        objective.check(mixture, tasks)


def test_measuring_is_never_refused() -> None:
    mixture = attach(tiny_llama(), experts={"a": LoRA(), "b": LoRA()}, router=ByTask())
    LoadBalance(weight=0.0).check(mixture, ["s"])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Entropy(direction="down"), "choose sharpen or spread"),  # type: ignore[arg-type]
        (lambda: MutualInformation(of="row"), "choose task or input"),  # type: ignore[arg-type]
        (lambda: Prior(shares=(1, 0)), "give numbers above 0"),
    ],
)
def test_wrong_settings_are_told(made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made()


def test_what_cannot_be_judged_is_told() -> None:
    bare = routed_at(Observation("here", Routing.constant(torch.ones(E) / E), RoutingContext()), EXPERTS, ("s", "t"))
    with pytest.raises(ValueError, match="this mixture's router gives none"):
        ZLoss().sums(bare)
    with pytest.raises(ValueError, match="needs the task of each routed row"):
        MutualInformation().sums(bare)
