"""Law 5: a bank under any routing adds what its adapters, run one by one, add up to."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moadapt import Routing
from moadapt.adapters import Bank, FamilySpec, NotMergeable
from moadapt.adapters.bank import Adapter
from moadapt.call import Call
from moadapt.merging.folding import PlainModel
from moadapt.sites import Site
from tests.conformance.canonical import FAMILY_PARAMS as EVERY_FAMILY
from tests.conformance.canonical import family_cases, routing_value

ROWS, TOKENS, WIDE, NARROW, EXPERTS = 3, 5, 12, 8, 4
PRESENT = {"shared": None, "zero": 0, "two": 2}
"""Experts 1 and 3 are absent here."""
MODULES: dict[str, tuple[Site, nn.Module]] = {
    "linear": (Site("blocks.0.linear", "language", "attention", 0, WIDE, NARROW), nn.Linear(WIDE, NARROW)),
    "sublayer": (Site("blocks.0.mlp", "language", "mlp", 0, NARROW, NARROW, "sublayer"), nn.Linear(NARROW, NARROW)),
    "norm": (Site("blocks.0.norm", "language", "norm", 0, NARROW, NARROW, "norm", True), nn.LayerNorm(NARROW)),
}
"""A small frozen module of each form that a bank can be tried at by itself."""
FAMILY_PARAMS = [case for case in EVERY_FAMILY if case.values[0].standalone]
"""Families whose exactness is not tested in a file of its own."""
CASES = [case for case in family_cases() if case.values[1] != "blended" and case.values[0].standalone]


def site_of(family: type[FamilySpec]) -> tuple[Site, nn.Module]:
    """Return a site that a family sits at, and its module."""
    return next(MODULES[form] for form in family.forms if form in MODULES)


def values_at(family: type[FamilySpec], *axes: int) -> tuple[Tensor, Tensor]:
    """Random input and frozen output of a site that a family sits at."""
    site = site_of(family)[0]
    x = torch.randn(*axes, site.in_features, dtype=torch.float64)
    return x, torch.randn(*axes, site.out_features, dtype=torch.float64)


def call_of(x: Tensor) -> Call:
    """A call whose second and third tokens stand for image patches and whose last one is no prompt."""
    rows, tokens = x.shape[:2] if x.ndim == 3 else (1, len(x))
    prompt, image = torch.ones(rows, tokens, dtype=torch.bool), torch.zeros(rows, tokens, dtype=torch.bool)
    prompt[:, -1], image[:, 1:3] = False, True
    return Call(rows, prompt=prompt, image=image)


def bank_of(family: type[FamilySpec], experts: dict[str, int | None]) -> Bank:
    """A bank of random float64 adapters."""
    site, module = site_of(family)
    adapters = [Adapter(name, family(), expert) for name, expert in experts.items()]
    bank = family.bank(site, adapters, module.double()).double()
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    return bank.eval()


def one_by_one(family: type[FamilySpec], bank: Bank, x: Tensor, y: Tensor, routing: Routing | None) -> Tensor:
    """Run every adapter in a bank of its own and add up what they add, weighted."""
    total = torch.zeros_like(y)
    for name in bank.names:
        alone = bank_of(family, {name: None})
        alone.load_state(name, bank.state(name))
        added, expert = alone(x, y, None, call_of(x)), PRESENT[name]
        if expert is not None:
            assert routing is not None
            weight = routing.dense()[..., expert]  # (B|1, T|1, H|1)
            weight = weight.repeat_interleave(y.shape[-1] // weight.shape[2], dim=2)
            added = weight.reshape(-1, y.shape[-1]) * added if x.ndim == 2 else weight * added
        total = total + added
    return total


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_bank_adds_what_its_adapters_add(family: type[FamilySpec], name: str) -> None:
    bank = bank_of(family, PRESENT)
    routing = routing_value(name, rows=ROWS, tokens=TOKENS, experts=EXPERTS, dtype=torch.float64)
    routing.weights.requires_grad_()
    x, y = values_at(family, ROWS, TOKENS)
    read, into = (x.requires_grad_(), y.requires_grad_(), routing.weights), torch.randn_like(y)
    found, expected = bank(x, y, routing, call_of(x)), one_by_one(family, bank, x, y, routing)
    assert_equal(found, expected)
    gradients = zip(
        torch.autograd.grad(found, read, into, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(expected, read, into, allow_unused=True, materialize_grads=True),
        strict=True,
    )
    for ours, theirs in gradients:
        assert_equal(ours, theirs)
    with torch.no_grad():
        assert_equal(bank.add_to(y.clone(), x, routing, call_of(x)), y + expected)


@pytest.mark.parametrize("family", FAMILY_PARAMS)
def test_a_bank_takes_inputs_without_a_row_axis(family: type[FamilySpec]) -> None:
    bank = bank_of(family, PRESENT)
    routing = routing_value("constant", rows=1, tokens=1, experts=EXPERTS, dtype=torch.float64)
    x, y = values_at(family, 7)
    assert_equal(bank(x, y, routing, call_of(x)), one_by_one(family, bank, x, y, routing))


@pytest.mark.parametrize("family", FAMILY_PARAMS)
def test_a_shared_adapter_alone_needs_no_routing(family: type[FamilySpec]) -> None:
    bank = bank_of(family, {"shared": None})
    x, y = values_at(family, ROWS, TOKENS)
    assert_equal(bank(x, y, None, call_of(x)), one_by_one(family, bank, x, y, None))


@pytest.mark.parametrize("family", FAMILY_PARAMS)
def test_fixed_weights_make_an_affine_map_or_a_refusal(family: type[FamilySpec]) -> None:
    bank = bank_of(family, PRESENT)
    weights = torch.randn(EXPERTS, dtype=torch.float64)
    if not family.mergeable:
        with pytest.raises(NotMergeable):
            bank.delta(weights)
        return
    delta = bank.delta(weights)
    module = site_of(family)[1].double()
    base: Any = nn.Sequential(module)
    base.dtype = torch.float64
    plain = PlainModel(base, None)
    plain.fold("0", [delta])
    folded = plain.model
    x = values_at(family, 7)[0]
    y = module(x)
    assert_equal(folded(x) - y, bank(x, y, Routing.constant(weights), call_of(x)))


@pytest.mark.parametrize("family", FAMILY_PARAMS)
def test_growing_trimming_and_freezing_keep_the_others_bits_and_outputs(family: type[FamilySpec]) -> None:
    bank = bank_of(family, PRESENT)
    x, y = values_at(family, ROWS, TOKENS)
    routing = routing_value("sequence_dense", rows=ROWS, tokens=1, experts=EXPERTS, dtype=torch.float64)
    states, expected = {name: bank.state(name) for name in bank.names}, bank(x, y, routing, call_of(x))

    def assert_kept(names: tuple[str, ...]) -> None:
        assert set(bank.names) == set(names)
        for name in set(names) & set(states):
            for part, tensor in bank.state(name).items():
                assert torch.equal(tensor, states[name][part]), (name, part)

    bank.grow(Adapter("four", family(), 4))
    assert_kept((*PRESENT, "four"))
    wider = Routing(torch.cat([routing.weights, torch.ones(ROWS, 1, 1, 1, dtype=torch.float64)], dim=-1), EXPERTS + 1)
    assert_equal(bank(x, y, wider, call_of(x)), expected)

    held: set[str] = set()  # what all have in common is frozen with the first of them
    for frozen in ("zero", "shared"):
        before = sum(p.numel() for p in bank.parameters() if p.requires_grad)
        bank.freeze(frozen)
        assert_kept((*PRESENT, "four"))
        for value in (wider, _one_expert(wider)):
            assert_equal(bank(x, y, value, call_of(x)), one_by_one_of(family, bank, states, x, y, value))
        size = sum(tensor.numel() for part, tensor in states[frozen].items() if part not in held)
        held |= set(bank.common)
        assert sum(p.numel() for p in bank.parameters() if p.requires_grad) == before - size

    bank.trim(["four", "two"])
    assert_kept(("shared", "two", "four"))
    swapped = Routing(wider.weights[..., [4, 2]], 2)
    without_zero = Routing(wider.weights * torch.tensor([0, 1, 1, 1, 1.0]), EXPERTS + 1)
    assert_equal(bank(x, y, swapped, call_of(x)), one_by_one_of(family, bank, states, x, y, without_zero))


@pytest.mark.parametrize("family", FAMILY_PARAMS)
def test_a_bank_without_experts_left_adds_nothing(family: type[FamilySpec]) -> None:
    bank = bank_of(family, {"zero": 0, "two": 2})
    assert bank.has_experts
    bank.trim([])
    x, y = values_at(family, ROWS, TOKENS)
    assert bank.names == ()
    assert not bank.has_experts
    none = bank(x, y, routing_value("constant", rows=1, tokens=1, dtype=torch.float64), call_of(x))
    assert torch.equal(none, torch.zeros_like(y))
    bank.grow(Adapter("new", family(), 0))
    assert bank.names == ("new",)
    assert bank.has_experts
    assert not bank_of(family, {"shared": None}).has_experts


@pytest.mark.parametrize("family", FAMILY_PARAMS)
def test_an_unknown_adapter_is_named(family: type[FamilySpec]) -> None:
    bank = bank_of(family, PRESENT)
    for act in (bank.state, bank.freeze, lambda name: bank.load_state(name, {})):
        with pytest.raises(ValueError, match=r"blocks\.0\.\w+ has no adapter 'nine'; it has shared, zero, two"):
            act("nine")


@pytest.mark.parametrize("family", FAMILY_PARAMS)
def test_state_of_another_shape_is_refused(family: type[FamilySpec]) -> None:
    bank = bank_of(family, PRESENT)
    state = bank.state("zero")
    for part, tensor in state.items():
        for wrong in ({**state, part: tensor[:-1]}, {k: t for k, t in state.items() if k != part}):
            with pytest.raises(ValueError, match=rf"blocks\.0\.\w+.*'zero' needs {part}"):
                bank.load_state("zero", wrong)


def _one_expert(routing: Routing) -> Routing:
    """The routing that gives every row its best expert, sparse."""
    weights, indices = routing.weights.topk(1, dim=-1)
    return Routing(weights, routing.num_experts, indices)


def one_by_one_of(
    family: type[FamilySpec], bank: Bank, states: dict[str, dict[str, Tensor]], x: Tensor, y: Tensor, routing: Routing
) -> Tensor:
    """Add up the adapters of `states`; those that are new add nothing."""
    total = torch.zeros_like(y)
    for name, state in states.items():
        alone = bank_of(family, {name: None})
        alone.load_state(name, state)
        expert = PRESENT[name]
        weight = 1.0 if expert is None else routing.dense()[..., expert]
        total = total + weight * alone(x, y, None, call_of(x))
    return total
