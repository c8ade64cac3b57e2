"""Law 5: every compute form of a bank equals a loop over its adapters, forward and gradients, in float64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moadapt.adapters import LoRA
from moadapt.adapters.bank import Adapter
from moadapt.adapters.lora_bank import LoRABank
from moadapt.routing import Routing
from moadapt.sites import Site

ROWS, TOKENS, WIDTH, OUT, EXPERTS = 4, 5, 6, 8, 6
SITE = Site("block.q_proj", "language", "attention", 0, WIDTH, OUT)
MODULE = torch.nn.Linear(WIDTH, OUT)
RANKS = (1, 3, 2, 1, 2, 3)
WEIGHTS_OF = {
    "constant": (1, 1, 1),
    "sequence": (ROWS, 1, 1),
    "token": (ROWS, TOKENS, 1),
    "heads": (ROWS, 1, 2),
    "token heads": (ROWS, TOKENS, 4),
}


def bank_of(*, shared: bool, ranks: Sequence[int] = RANKS, absent: int | None = None) -> LoRABank:
    torch.manual_seed(3)
    adapters = [Adapter("shared", LoRA(rank=2, alpha=5), None)] if shared else []
    adapters += [
        Adapter(f"e{i}", LoRA(rank=rank, alpha=2 * rank + i, rank_stabilized=i % 2 == 1), i)
        for i, rank in enumerate(ranks)
        if i != absent
    ]
    bank = LoRABank(SITE, adapters, MODULE).double()
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter)
    return bank


def by_loop(bank: LoRABank, x: Tensor, weights: Tensor) -> Tensor:
    """Add up the adapters one by one; weights are (B|1, T|1, H|1, E)."""
    total = torch.zeros(*x.shape[:-1], OUT, dtype=x.dtype)
    heads = weights.shape[2]
    for part in ("shared", "expert", "frozen"):
        start = 0
        for adapter in bank._adapters[part]:
            assert isinstance(adapter.spec, LoRA)
            rows = slice(start, start := start + adapter.spec.rank)
            own = adapter.spec.scale * (x @ getattr(bank, f"{part}_down")[rows].T) @ getattr(bank, f"{part}_up")[rows]
            if adapter.expert is not None:
                sliced = own.unflatten(-1, (heads, OUT // heads))
                own = (sliced * weights[..., adapter.expert].unsqueeze(-1)).flatten(-2)
            total = total + own
    return total


def check(bank: LoRABank, x: Tensor, routing: Routing, leaf: Tensor) -> None:
    y = torch.randn(*x.shape[:-1], OUT, dtype=torch.float64)
    grad = torch.randn_like(y)
    wanted = y + by_loop(bank, x, routing.dense())
    inputs = [x, leaf, *(p for p in bank.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(wanted, inputs, grad, retain_graph=True)
    got = bank.add_to(y.clone(), x, routing)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    for ours, loop in zip(torch.autograd.grad(got, inputs, grad), expected, strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(bank.add_to(y.clone(), x, routing), wanted, rtol=1e-10, atol=1e-10)


def leaf_input() -> Tensor:
    return torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("form", WEIGHTS_OF)
def test_dense_weights_equal_the_loop(form: str, shared: bool) -> None:
    leaf = torch.randn(*WEIGHTS_OF[form], EXPERTS, dtype=torch.float64, requires_grad=True)
    check(bank_of(shared=shared), leaf_input(), Routing(leaf, EXPERTS), leaf)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_sparse_weights_equal_the_loop(chosen: int, tokens: int, shared: bool) -> None:
    indices = torch.rand(ROWS, tokens, 1, EXPERTS).argsort(dim=-1)[..., :chosen]
    leaf = torch.randn(*indices.shape, dtype=torch.float64, requires_grad=True)
    bank = bank_of(shared=shared)
    routing = Routing(leaf, EXPERTS, indices)
    taken, whole = 2 * shared + max(RANKS) * chosen, 2 * shared + sum(RANKS)
    assert bank._gathers(routing) == (tokens == 1 and 2 * taken <= whole)  # all forms are tried
    assert bank._tiles(routing) == (tokens > 1 and 2 * max(RANKS) * chosen <= sum(RANKS))
    check(bank, leaf_input(), routing, leaf)


@pytest.mark.parametrize("absent", [0, EXPERTS - 1])
def test_an_absent_expert_adds_nothing(absent: int) -> None:
    leaf = torch.ones(ROWS, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    indices = torch.full((ROWS, 1, 1, 1), absent)
    indices[0] = 2
    check(bank_of(shared=False, absent=absent), leaf_input(), Routing(leaf, EXPERTS, indices), leaf)


def test_frozen_adapters_count_and_get_no_gradient() -> None:
    bank = bank_of(shared=True)
    bank.freeze("e2")
    assert not bank.frozen_down.requires_grad
    leaf = torch.randn(ROWS, 1, 1, EXPERTS, dtype=torch.float64, requires_grad=True)
    check(bank, leaf_input(), Routing(leaf, EXPERTS), leaf)


@pytest.mark.parametrize("heads", [1, 2])
def test_blended_parameters_equal_the_loop(heads: int) -> None:
    bank = bank_of(shared=False, ranks=[2] * EXPERTS)
    for name in bank.names:  # one scale, as blending asks
        assert name.startswith("e")
    bank = LoRABank(SITE, [Adapter(f"e{i}", LoRA(rank=2, alpha=3), i) for i in range(EXPERTS)], MODULE).double()
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter)
    x, weights = leaf_input(), torch.rand(ROWS, 1, heads, EXPERTS, dtype=torch.float64)
    got = bank.add_to(
        torch.zeros(ROWS, TOKENS, OUT, dtype=torch.float64), x, Routing(weights, EXPERTS, combines="parameters")
    )
    down, up = bank.expert_down.view(EXPERTS, 2, WIDTH), bank.expert_up.view(EXPERTS, 2, OUT)
    for row in range(ROWS):
        blended = []
        for factors in (down, up):
            slices = factors.chunk(heads, dim=-1)
            blended.append(
                torch.cat([sum(weights[row, 0, h, e] * s[e] for e in range(EXPERTS)) for h, s in enumerate(slices)], -1)
            )
        torch.testing.assert_close(got[row], 1.5 * x[row] @ blended[0].T @ blended[1], rtol=1e-10, atol=1e-10)


def test_two_dimensional_inputs_equal_three_dimensional_ones() -> None:
    bank, x = bank_of(shared=True), leaf_input()
    routing = Routing.constant(torch.rand(EXPERTS, dtype=torch.float64))
    flat = bank.add_to(torch.zeros(ROWS * TOKENS, OUT, dtype=torch.float64), x.flatten(0, 1), routing)
    whole = bank.add_to(torch.zeros(ROWS, TOKENS, OUT, dtype=torch.float64), x, routing)
    torch.testing.assert_close(flat, whole.flatten(0, 1), rtol=1e-12, atol=1e-12)
