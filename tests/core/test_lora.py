"""LoRA banks against the formula, adapter by adapter, in every compute form."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moadapt import Routing, RoutingContext
from moadapt.adapters import LoRA
from moadapt.adapters.bank import Adapter
from moadapt.adapters.lora_bank import LoRABank
from moadapt.adapters.lowrank import Ranks, add_gathered, add_stacked, stacked_linear
from moadapt.sites import Site
from moadapt_routers import Constant
from tests.conformance.canonical import ROUTING_NAMES, routing_value

ROWS, TOKENS, WIDE, NARROW = 4, 5, 12, 8
SITE = Site("blocks.0.linear", "language", "attention", 0, WIDE, NARROW)
MODULE = nn.Linear(WIDE, NARROW)
RAGGED = {
    "shared": LoRA(rank=3, alpha=5.0),
    "a": LoRA(rank=2),
    "b": LoRA(rank=3, alpha=1.0, ranks={SITE.path: 5, "elsewhere": 1}),
    "c": LoRA(rank=1, alpha=4.0, rank_stabilized=True),
    "d": LoRA(rank=4, rank_stabilized=True),
}
EQUAL = {"shared": LoRA(rank=3), **{name: LoRA(rank=2, alpha=3.0) for name in "abcdef"}}


@dataclass
class One:
    """An adapter by itself, with leaves of its own."""

    spec: LoRA
    expert: int | None
    down: Tensor
    up: Tensor

    @property
    def scale(self) -> float:
        alpha = self.spec.rank if self.spec.alpha is None else self.spec.alpha
        return alpha / (math.sqrt(self.spec.rank) if self.spec.rank_stabilized else self.spec.rank)

    def added(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.down.T) @ self.up


def build(specs: dict[str, LoRA], absent: tuple[str, ...] = (), frozen: tuple[str, ...] = ()) -> tuple[LoRABank, Any]:
    """A random float64 bank and its adapters by themselves.

    Args:
        specs: By name; `shared` is the shared adapter and the others are experts in order.
        absent: Experts that do not sit here.
        frozen: Adapters to freeze.
    """
    experts = [name for name in specs if name != "shared"]
    adapters = [
        Adapter(name, spec, None if name == "shared" else experts.index(name))
        for name, spec in specs.items()
        if name not in absent
    ]
    bank = LoRABank(SITE, adapters, MODULE).double()
    for name in frozen:
        bank.freeze(name)
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    ones = {
        a.name: One(a.spec, a.expert, *(bank.state(a.name)[side].requires_grad_() for side in ("down", "up")))
        for a in adapters
    }
    return bank, ones


def naive(ones: dict[str, One], x: Tensor, y: Tensor, routing: Routing | None) -> Tensor:
    """Blend adapters the slow way: one expert, one head after the other."""
    if routing is not None and routing.combines == "parameters":
        return blended(ones, x, y, routing)
    total = y
    for one in ones.values():
        if one.expert is None:
            total = total + one.added(x)
            continue
        assert routing is not None
        weight = routing.dense()[..., one.expert]
        parts = one.added(x).chunk(weight.shape[2], dim=-1)
        total = total + torch.cat([part * weight[:, :, h : h + 1] for h, part in enumerate(parts)], dim=-1)
    return total


def blended(ones: dict[str, One], x: Tensor, y: Tensor, routing: Routing) -> Tensor:
    """Blend the factors row by row and head by head, then apply them."""
    weights, rows = routing.dense()[:, 0], []
    heads = weights.shape[1]
    experts = [one for one in ones.values() if one.expert is not None]
    for row in range(len(x)):
        down, up = (
            torch.cat(
                [
                    sum(weights[row, h, one.expert] * getattr(one, side).chunk(heads, dim=1)[h] for one in experts)
                    for h in range(heads)
                ],
                dim=1,
            )
            for side in ("down", "up")
        )
        rows.append(experts[0].scale * (x[row] @ down.T) @ up)
    shared = [one.added(x) for one in ones.values() if one.expert is None]
    return y + torch.stack(rows) + sum(shared)


def gradients_of(bank: LoRABank, ones: dict[str, One]) -> dict[str, Tensor]:
    """The bank's gradients by adapter and side; frozen adapters have none."""
    rows = bank.expert_rows()
    found = {}
    for name, one in ones.items():
        for side in ("down", "up"):
            if one.expert is None:
                stacked, mine = bank.shared_down if side == "down" else bank.shared_up, slice(None)
            elif f"expert_{side}" in rows:
                stacked, mine = getattr(bank, f"expert_{side}"), rows[f"expert_{side}"] == one.expert
            else:
                continue
            if stacked is not None and stacked.grad is not None and len(stacked.grad[mine]):
                found[f"{name}.{side}"] = stacked.grad[mine]
    return found


def assert_equal(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, what
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max(), what


def assert_exact(
    bank: LoRABank, ones: dict[str, One], x: Tensor, routing: Routing | None, frozen: tuple[str, ...]
) -> None:
    """Compare output and all gradients with the naive loop."""
    inputs = {"x": x.requires_grad_()}
    if routing is not None:
        inputs["weights"] = routing.weights.requires_grad_()
    y, into = torch.randn(2, *x.shape[:-1], NARROW, dtype=torch.float64)
    found, expected = bank.add_to(y.clone(), x, routing), naive(ones, x, y, routing)
    assert_equal(found, expected, "output")
    assert_equal(bank(x, y, routing), expected - y, "delta")
    leaves = {f"{name}.{side}": getattr(one, side) for name, one in ones.items() for side in ("down", "up")}
    wanted = torch.autograd.grad(expected, [*inputs.values(), *leaves.values()], into, allow_unused=True)
    found.backward(into)
    ours = {**{name: tensor.grad for name, tensor in inputs.items()}, **gradients_of(bank, ones)}
    for name, gradient in zip([*inputs, *leaves], wanted, strict=True):
        if name.partition(".")[0] in frozen:
            assert name not in ours
        else:
            assert_equal(ours[name], gradient, name)


@pytest.mark.parametrize("frozen", [(), ("b",), ("shared", "a")], ids=str)
@pytest.mark.parametrize("absent", [(), ("a", "d")], ids=str)
@pytest.mark.parametrize("name", [name for name in ROUTING_NAMES if name != "blended"])
def test_ragged_ranks_equal_the_loop(name: str, absent: tuple[str, ...], frozen: tuple[str, ...]) -> None:
    frozen = tuple(each for each in frozen if each not in absent)
    bank, ones = build(RAGGED, absent, frozen)
    routing = routing_value(name, rows=ROWS, tokens=TOKENS, experts=4, dtype=torch.float64)
    assert_exact(bank, ones, torch.randn(ROWS, TOKENS, WIDE, dtype=torch.float64), routing, frozen)


@pytest.mark.parametrize("frozen", [(), ("b", "f"), ("shared",)], ids=str)
@pytest.mark.parametrize("name", ROUTING_NAMES)
def test_many_equal_experts_equal_the_loop(name: str, frozen: tuple[str, ...]) -> None:
    bank, ones = build(EQUAL, frozen=frozen)
    routing = routing_value(name, rows=ROWS, tokens=TOKENS, experts=6, dtype=torch.float64)
    assert_exact(bank, ones, torch.randn(ROWS, TOKENS, WIDE, dtype=torch.float64), routing, frozen)


@pytest.mark.parametrize("name", ["task", "sequence_sparse", "sequence_dense", "constant", "blended"])
def test_no_shared_adapter_and_one_row_or_token_equal_the_loop(name: str) -> None:
    for rows, tokens in ((1, TOKENS), (ROWS, 1), (1, 1)):
        bank, ones = build({name: spec for name, spec in EQUAL.items() if name != "shared"})
        routing = routing_value(name, rows=rows, tokens=tokens, experts=6, dtype=torch.float64)
        assert_exact(bank, ones, torch.randn(rows, tokens, WIDE, dtype=torch.float64), routing, ())


@pytest.mark.parametrize("routed", [True, False])
def test_two_axes_equal_the_loop(routed: bool) -> None:
    specs = RAGGED if routed else {"shared": RAGGED["shared"]}
    bank, ones = build(specs)
    routing = routing_value("constant", rows=1, tokens=1, experts=4, dtype=torch.float64) if routed else None
    x = torch.randn(7, WIDE, dtype=torch.float64)
    y, into = torch.randn(2, 7, NARROW, dtype=torch.float64)
    found = bank.add_to(y.clone(), x, routing)
    assert_equal(found, naive(ones, x.unsqueeze(0), y.unsqueeze(0), routing)[0], "output")
    found.backward(into)
    wanted = torch.autograd.grad(naive(ones, x.unsqueeze(0), y.unsqueeze(0), routing)[0], ones["shared"].up, into)[0]
    assert_equal(bank.shared_up.grad, wanted, "shared.up")


def test_a_row_that_gives_one_expert_twice_counts_it_twice() -> None:
    bank, ones = build(EQUAL)
    indices = torch.tensor([[2, 2], [0, 3], [5, 5], [1, 0]]).reshape(ROWS, 1, 1, 2)
    routing = Routing(torch.rand(ROWS, 1, 1, 2, dtype=torch.float64), 6, indices)
    assert_exact(bank, ones, torch.randn(ROWS, TOKENS, WIDE, dtype=torch.float64), routing, ())


def ranks_of(shared: int, *owners: int) -> Ranks:
    scale = torch.arange(1, shared + len(owners) + 1, dtype=torch.float64) / 3
    return Ranks(shared, torch.tensor(owners, dtype=torch.long), scale)


@pytest.mark.parametrize("weight_axes", [(1, 1), (ROWS, 1), (ROWS, TOKENS), (1, TOKENS)], ids=str)
@pytest.mark.parametrize("shared", [0, 2])
def test_gradcheck_of_the_stacked_form(shared: int, weight_axes: tuple[int, int]) -> None:
    ranks = ranks_of(shared, 2, 0, 0)  # ragged; expert 1 and the last one are absent
    count = shared + 3
    y, x, down, up, weights, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((ROWS, TOKENS, 3), (ROWS, TOKENS, 4), (count, 4), (count, 3), (*weight_axes, 4), (3,))
    )
    rest = (x, down, up, weights)
    assert torch.autograd.gradcheck(lambda y, *rest: add_stacked(y.clone(), *rest, ranks), (y, *rest))
    linear = nn.Linear(4, 3).double().requires_grad_(False)
    linear.bias.data = bias.detach()
    assert torch.autograd.gradcheck(lambda *rest: stacked_linear(linear, *rest, ranks), rest)


def test_ranks_spread_and_collect_weights() -> None:
    ranks, weights = ranks_of(1, 2, 0, 0), torch.tensor([10.0, 20, 30, 40], dtype=torch.float64).reshape(1, 1, 4)
    thirds = torch.tensor([1 / 3, 2 / 3, 1, 4 / 3], dtype=torch.float64)
    assert torch.equal(ranks.spread(weights, torch.float64), thirds * torch.tensor([1.0, 30, 10, 10]).reshape(1, 1, 4))
    assert torch.equal(ranks.spread(None, torch.float64), thirds.reshape(1, 1, 4))
    gradient = torch.tensor([7.0, 3, 6, 9], dtype=torch.float64).reshape(1, 1, 4)
    expected = torch.tensor([6 * 1 + 9 * 4 / 3, 0, 3 * 2 / 3, 0], dtype=torch.float64).reshape(1, 1, 4)
    torch.testing.assert_close(ranks.collect(gradient, weights), expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ROUTING_NAMES)
def test_a_linear_layer_taken_along_gives_the_same_step(name: str, bias: bool) -> None:
    """The base's product joins the stacked form where it can; results are those of running the layer first."""
    bank, _ = build(EQUAL)
    linear = nn.Linear(WIDE, NARROW, bias=bias).double().requires_grad_(False)
    routing = routing_value(name, rows=ROWS, tokens=TOKENS, experts=6, dtype=torch.float64)
    routing.weights.requires_grad_()
    x = torch.randn(ROWS, TOKENS, WIDE, dtype=torch.float64, requires_grad=True)
    leaves = [x, routing.weights, *bank.parameters()]
    into = torch.randn(ROWS, TOKENS, NARROW, dtype=torch.float64)
    together, apart = bank.adapt(linear, x, routing, None), bank.add_to(linear(x), x, routing)
    assert_equal(together, apart, "output")
    for found, expected in zip(*(torch.autograd.grad(out, leaves, into) for out in (together, apart)), strict=True):
        assert_equal(found, expected, "gradient")


@pytest.mark.parametrize(
    "why", ["a hook", "another forward", "trained", "trained bias", "another class", "no gradient"]
)
def test_a_layer_that_others_change_is_run_by_itself(why: str) -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    bank, _ = build(EQUAL)
    linear: Any = Doubling(WIDE, NARROW) if why == "another class" else nn.Linear(WIDE, NARROW)
    linear = linear.double().requires_grad_(why == "trained")
    linear.bias.requires_grad_(why in ("trained", "trained bias"))
    if why == "a hook":
        linear.register_forward_hook(lambda module, args, output: 2 * output)
    if why == "another forward":
        own = linear.forward
        linear.forward = lambda x: 2 * own(x)
    routing = routing_value("constant", rows=1, tokens=1, experts=6, dtype=torch.float64)
    x = torch.randn(ROWS, TOKENS, WIDE, dtype=torch.float64)
    with torch.set_grad_enabled(why != "no gradient"):
        out = bank.adapt(linear, x, routing, None)
    torch.testing.assert_close(out, linear(x) + bank(x, torch.zeros_like(out), routing))
    if why.startswith("trained"):
        out.sum().backward()
        assert linear.bias.grad is not None
        assert (linear.weight.grad is not None) == (why == "trained")


def test_scales_survive_a_cast_of_the_bank() -> None:
    bank, ones = build(RAGGED)
    bank.to(torch.bfloat16).double()
    weights = torch.ones(4, dtype=torch.float64)
    rounded = {name: bank.state(name) for name in ones}
    expected = sum(one.scale * rounded[name]["up"].T @ rounded[name]["down"] for name, one in ones.items())
    torch.testing.assert_close(bank.delta(weights).weight(), expected)


@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_gradcheck_of_the_gathered_form(tokens: int) -> None:
    y, x, down, up, weights = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((ROWS, TOKENS, 3), (ROWS, TOKENS, 4), (6, 4), (6, 3), (ROWS, tokens, 2))
    )
    ranks = torch.tensor([[0, 1], [4, 5], [2, 2], [0, 5]])
    assert torch.autograd.gradcheck(lambda y, *rest: add_gathered(y.clone(), *rest, ranks), (y, x, down, up, weights))


@pytest.mark.parametrize("form", ["task", "sequence_dense"])
def test_the_forms_without_gradient_equal_those_with(form: str) -> None:
    bank, _ = build(EQUAL)
    routing = routing_value(form, rows=ROWS, tokens=TOKENS, experts=6, dtype=torch.float64)
    x, y = torch.randn(ROWS, TOKENS, WIDE, dtype=torch.float64), torch.zeros(ROWS, TOKENS, NARROW, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(bank(x, y, routing), bank(x, y, routing))
        silent = bank(x, y, routing)
    assert torch.equal(silent, bank(x, y, routing))


def test_dropout_drops_inputs_in_training_only() -> None:
    bank, ones = build({"shared": LoRA(rank=2, dropout=0.5)})
    x, y = torch.ones(1, 1000, WIDE, dtype=torch.float64), torch.zeros(1, 1000, NARROW, dtype=torch.float64)
    with torch.no_grad():
        assert_equal(bank.eval()(x, y, None), ones["shared"].added(x), "evaluation")
        dropped = bank.train()(x, y, None)
        assert len({tuple(row) for row in dropped[0].tolist()}) > 100
        torch.testing.assert_close(dropped.mean(dim=1), ones["shared"].added(x)[:, 0], rtol=0.3, atol=1.0)


def test_weights_that_do_not_fit_are_refused_with_the_path() -> None:
    bank, _ = build(RAGGED)
    x, y = torch.randn(ROWS, TOKENS, WIDE, dtype=torch.float64), torch.zeros(ROWS, TOKENS, NARROW, dtype=torch.float64)
    three = Routing(torch.ones(ROWS, 1, 3, 4, dtype=torch.float64), 4)
    with pytest.raises(ValueError, match=r"blocks\.0\.linear: 3 routing heads do not divide its widths \(8,\)"):
        bank(x, y, three)
    five = Routing(torch.ones(ROWS, 1, 5, 6, dtype=torch.float64), 6, combines="parameters")
    with pytest.raises(ValueError, match=r"blocks\.0\.linear: 5 routing heads do not divide its widths \(12, 8\)"):
        build(EQUAL)[0](x, y, five)
    for tokens in (1, TOKENS):
        weights = torch.rand(ROWS, tokens, 1, len(RAGGED) - 1, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"blocks\.0\.linear: blending parameters needs"):
            bank(x, y, Routing(weights, len(RAGGED) - 1, combines="parameters"))


@pytest.mark.parametrize("heads", [1, 2])
def test_parameters_blended_by_token_are_those_of_a_row_of_each_token(heads: int) -> None:
    bank, _ = build(EQUAL)
    x = torch.randn(ROWS, TOKENS, WIDE, dtype=torch.float64)
    y = torch.randn(ROWS, TOKENS, NARROW, dtype=torch.float64)
    experts = len(EQUAL) - 1
    routing = Routing(torch.randn(ROWS, TOKENS, heads, experts, dtype=torch.float64), experts, combines="parameters")
    found = bank(x, y, routing)
    for token in range(TOKENS):
        here = slice(token, token + 1)
        expected = bank(x[:, here], y[:, here], replace(routing, weights=routing.weights[:, here]))
        torch.testing.assert_close(found[:, here], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("given", [{"rank": 0}, {"rank": -1}, {"dropout": 1.0}, {"dropout": -0.1}], ids=str)
def test_values_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need rank >= 1 and 0 <= dropout < 1"):
        LoRA(**given)


def test_dropouts_that_differ_at_a_site_are_refused() -> None:
    adapters = [Adapter("a", LoRA(dropout=0.1), 0), Adapter("b", LoRA(dropout=0.2), 1)]
    with pytest.raises(ValueError, match=r"blocks\.0\.linear: LoRAs of one site share a dropout mask.*0\.1, 0\.2"):
        LoRA.bank(SITE, adapters, MODULE)


def test_fresh_factors_start_as_the_method_says() -> None:
    bank = LoRA.bank(SITE, [Adapter("a", LoRA(rank=500), 0)], MODULE)
    state = bank.state("a")
    bound = 1 / math.sqrt(WIDE)
    assert not state["up"].any()
    assert bound * 0.98 < state["down"].abs().max() <= bound
    assert abs(float(state["down"].mean())) < 0.02


def test_growing_and_merging_stay_on_the_device_of_the_bank() -> None:
    """The meta device refuses tensors of another device as any accelerator does."""
    bank = LoRABank(SITE, [Adapter("shared", LoRA(rank=3), None), Adapter("a", LoRA(rank=2), 0)], MODULE).to("meta")
    bank.grow(Adapter("b", LoRA(rank=4), 1))
    delta = bank.delta(torch.tensor([0.5, 2.0]))
    assert {tensor.device.type for tensor in (delta.down, delta.up, *bank.parameters(), *bank.buffers())} == {"meta"}
    assert (delta.down.shape, delta.up.shape) == ((9, WIDE), (9, NARROW))


def test_whole_numbers_as_constant_weights_keep_scales() -> None:
    bank, ones = build({"a": LoRA(rank=4, alpha=1.0), "b": LoRA(rank=2, alpha=3.0)})
    x, y = torch.randn(ROWS, TOKENS, WIDE, dtype=torch.float64), torch.zeros(ROWS, TOKENS, NARROW, dtype=torch.float64)
    routing = Constant(weights=(1, 2)).build(WIDE, 2)(RoutingContext())
    torch.testing.assert_close(bank(x, y, routing), ones["a"].added(x) + 2 * ones["b"].added(x), rtol=1e-6, atol=1e-6)
