"""Overlaps against the dense formulas, their bounds, their gradients, and what a change of basis does to them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moadapt import Mixture, Placement, attach
from moadapt.adapters import Adapter, LoRA
from moadapt.adapters.lora_bank import LoRABank
from moadapt.objectives import Orthogonality, overlaps
from moadapt.objectives.overlap import grouped_overlaps
from moadapt.sites import Site
from moadapt_routers import ByTask
from tests.models import randomize, tiny_llama, tiny_llava

WIDE, NARROW = 12, 8
SPECS = {"shared": LoRA(rank=3, alpha=5.0), "a": LoRA(rank=2), "b": LoRA(rank=4, alpha=1.0)}
MEASURES: list[dict[str, Any]] = [
    {"measure": "deltas"},
    {"measure": "subspaces"},
    {"measure": "subspaces", "side": "output"},
    {"measure": "raw"},
    {"measure": "raw", "side": "output"},
]
INVARIANT = MEASURES[:3]


class Banks:
    """What a mixture is to an objective: banks with their sites."""

    def __init__(self, *banks: LoRABank) -> None:
        self._banks = banks
        self.sites = {bank.site: None for bank in banks}

    def banks(self) -> Any:
        return ((bank.site, bank) for bank in self._banks)


def bank_of(specs: dict[str, LoRA], path: str = "blocks.0.linear") -> LoRABank:
    """A bank of random float64 adapters."""
    site = Site(path, "language", "attention", 0, WIDE, NARROW)
    experts = [name for name in specs if name != "shared"]
    adapters = [Adapter(n, spec, None if n == "shared" else experts.index(n)) for n, spec in specs.items()]
    bank = LoRABank(site, adapters, nn.Linear(WIDE, NARROW)).double()
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    return bank


def in_another_basis(bank: LoRABank) -> LoRABank:
    """The same adapters, `(R A, R^-T B)` for random R."""
    other = bank_of(SPECS)
    for name in bank.names:
        state = bank.state(name)
        basis = torch.randn(len(state["down"]), len(state["down"]), dtype=torch.float64)
        other.load_state(name, {"down": basis @ state["down"], "up": torch.linalg.inv(basis).T @ state["up"]})
    return other


def dense(bank: LoRABank, first: str, second: str, measure: str, side: str = "input") -> Tensor:
    """The formula, with whole matrices and orthonormal bases from QR."""
    states = [bank.state(name) for name in (first, second)]
    if measure == "deltas":
        one, two = (SPECS[n].scale * s["up"].T @ s["down"] for n, s in zip((first, second), states, strict=True))
        return (one * two).sum() ** 2 / (one.square().sum() * two.square().sum())
    rows = [state["down" if side == "input" else "up"] for state in states]
    if measure == "raw":
        scales = [1.0, 1.0] if side == "input" else [SPECS[name].scale for name in (first, second)]
        return (scales[0] * rows[0] @ rows[1].T * scales[1]).square().sum()
    bases = [torch.linalg.qr(row.T).Q for row in rows]
    return (bases[0].T @ bases[1]).square().sum() / min(len(row) for row in rows)


def gradients(bank: LoRABank, **options: Any) -> list[Tensor]:
    value = Orthogonality(**options).value(Banks(bank))
    return [g for g in torch.autograd.grad(value, list(bank.parameters()), allow_unused=True) if g is not None]


@pytest.mark.parametrize("options", MEASURES, ids=str)
def test_overlap_equals_the_dense_formula(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    bank = bank_of(SPECS)
    names, matrix = overlaps(Banks(bank), **options)["blocks.0.linear"]
    assert names == ("shared", "a", "b")
    expected = torch.stack([torch.stack([dense(bank, i, j, **options) for j in names]) for i in names])
    torch.testing.assert_close(matrix, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", INVARIANT, ids=str)
def test_a_change_of_basis_inside_adapters_changes_nothing(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    bank = bank_of(SPECS)
    (_, before), (_, after) = (overlaps(Banks(b), **options)["blocks.0.linear"] for b in (bank, in_another_basis(bank)))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)


def test_raw_products_depend_on_the_basis() -> None:
    torch.manual_seed(0)
    bank = bank_of(SPECS)
    values = [Orthogonality(measure="raw").value(Banks(b)).item() for b in (bank, in_another_basis(bank))]
    assert abs(values[0] - values[1]) > 0.1 * values[0]


@pytest.mark.parametrize("options", MEASURES, ids=str)
def test_gradients_are_those_of_finite_differences(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    bank = bank_of(SPECS)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in bank.named_parameters()}

    def value(*given: Tensor) -> Tensor:
        swapped = dict(zip(parameters, given, strict=True))
        for name, tensor in swapped.items():
            bank._parameters[name] = tensor  # type: ignore[assignment]
        return Orthogonality(**options).value(Banks(bank))

    assert torch.autograd.gradcheck(value, tuple(parameters.values()))


@pytest.mark.parametrize("options", INVARIANT, ids=str)
def test_overlap_is_one_for_equal_adapters_and_none_for_orthogonal_ones(options: dict[str, Any]) -> None:
    bank = bank_of({"a": LoRA(rank=3), "b": LoRA(rank=3)})
    bank.load_state("b", bank.state("a"))
    assert overlaps(Banks(bank), **options)["blocks.0.linear"][1][0, 1].item() == pytest.approx(1, abs=1e-9)
    whole = torch.eye(WIDE, dtype=torch.float64)
    for name, rows in (("a", slice(0, 3)), ("b", slice(3, 6))):
        bank.load_state(name, {"down": whole[rows], "up": whole[rows, :NARROW]})
    assert overlaps(Banks(bank), **options)["blocks.0.linear"][1][0, 1].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("options", MEASURES, ids=str)
@pytest.mark.parametrize("case", ["fresh", "all zero", "dependent rows", "cancelling"])
def test_value_and_gradients_are_finite_where_something_is_zero(
    options: dict[str, Any], case: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    bank = bank_of({"a": LoRA(rank=4), "b": LoRA(rank=4)}).to(dtype)
    state = bank.state("a")
    changed = {
        "fresh": {**state, "up": 0 * state["up"]},
        "all zero": {name: 0 * tensor for name, tensor in state.items()},
        "dependent rows": {name: tensor[[0, 0, 1, 1]] for name, tensor in state.items()},
        "cancelling": {"down": state["down"][[0, 1, 0, 1]], "up": torch.cat([state["up"][:2], -state["up"][:2]])},
    }
    bank.load_state("a", changed[case])
    value = Orthogonality(**options).value(Banks(bank))
    assert torch.isfinite(value)
    assert all(gradient.isfinite().all() for gradient in gradients(bank, **options))
    if options["measure"] == "deltas" and case != "dependent rows":
        assert value.item() == pytest.approx(0, abs=1e-6)
    if options["measure"] == "subspaces" and options.get("side") is None and case in ("dependent rows", "cancelling"):
        two = torch.linalg.qr(changed[case]["down"][:3:2].T if case == "dependent rows" else state["down"][:2].T).Q
        other = torch.linalg.qr(bank.state("b")["down"].T).Q
        assert value.item() == pytest.approx((two.T @ other).square().sum().item() / 4, abs=1e-4)


def test_frozen_adapters_count_and_get_no_gradient() -> None:
    torch.manual_seed(0)
    bank = bank_of(SPECS)
    pairs = {pair: dense(bank, *pair, measure="deltas") for pair in (("shared", "a"), ("shared", "b"), ("a", "b"))}
    for name in ("shared", "a"):
        bank.freeze(name)
    value = Orthogonality().value(Banks(bank))
    expected = (pairs["shared", "b"] + pairs["a", "b"]) / 2  # two frozen ones are no pair
    torch.testing.assert_close(value, expected)
    trained = {name: p for name, p in bank.named_parameters() if p.requires_grad}
    assert set(trained) == {"expert_down", "expert_up"}
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(value, list(trained.values())))


@pytest.mark.parametrize(
    ("options", "pairs"),
    [({"shared": False}, [("a", "b")]), ({"experts": False}, [("shared", "a"), ("shared", "b")])],
    ids=["experts", "shared"],
)
def test_either_kind_of_pair_can_be_left_out(options: dict[str, Any], pairs: list[tuple[str, str]]) -> None:
    torch.manual_seed(0)
    bank = bank_of(SPECS)
    expected = torch.stack([dense(bank, *pair, measure="deltas") for pair in pairs]).mean()
    torch.testing.assert_close(Orthogonality(**options).value(Banks(bank)), expected)


def ragged() -> Mixture:
    """Adapters that sit at different sites of two towers, all but one at more than one site."""
    vision = Placement(towers=("vision", "language"))
    experts = {"a": LoRA(rank=2), "b": LoRA(rank=3, placement=vision), "c": LoRA(rank=1)}
    mixture = attach(tiny_llava(), shared=LoRA(rank=4, placement=vision), experts=experts, router=ByTask())
    randomize(mixture)
    return mixture


def test_adapters_are_compared_where_both_sit() -> None:
    mixture = ragged()
    found = overlaps(mixture)
    assert list(found) == [site.path for site in mixture.sites]
    here = {site.tower: found[site.path][0] for site in mixture.sites}
    assert here == {"vision": ("shared", "b"), "language": ("shared", "a", "b", "c")}
    above = [matrix[i, j] for _, matrix in found.values() for i in range(len(matrix)) for j in range(i)]
    torch.testing.assert_close(Orthogonality().value(mixture), torch.stack(above).mean())


def test_sites_with_the_same_adapters_are_one_batch() -> None:
    groups = list(grouped_overlaps(ragged(), "subspaces"))
    assert sorted(group.names for group in groups) == [("shared", "a", "b", "c"), ("shared", "b")]
    assert sum(len(group.sites) for group in groups) == len(ragged().sites)


def test_a_mixture_can_freeze_an_adapter_at_all_its_sites() -> None:
    mixture = ragged()
    before = overlaps(mixture)
    mixture.freeze("b")
    assert all(("b" in group.names) == (group.frozen == {"b"}) for group in grouped_overlaps(mixture, "deltas"))
    order = [before[path][0].index(name) for path, (names, _) in overlaps(mixture).items() for name in names]
    assert len(order) == sum(len(names) for names, _ in before.values())
    with pytest.raises(ValueError, match="no adapter 'd' to freeze; this mixture has shared, a, b, c"):
        mixture.freeze("d")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "got weight=-1.0; give 0 or more"),
        ({"measure": "weights"}, "got measure='weights', side='input'; measure is deltas, subspaces or raw"),
        ({"side": "output"}, "of deltas has no side"),
        ({"experts": False, "shared": False}, "let it compare at least one"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Orthogonality(**options)


def test_a_lone_adapter_has_nothing_to_be_compared_with() -> None:
    with pytest.raises(ValueError, match="finds no two adapters to keep apart"):
        Orthogonality().value(attach(tiny_llama(), shared=LoRA(rank=2)))
