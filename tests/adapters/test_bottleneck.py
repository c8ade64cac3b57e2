"""Bottleneck banks against the formula, adapter by adapter, with every option."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from moadapt import Placement, Routing, attach
from moadapt.adapters import Bottleneck, NotMergeable
from moadapt.adapters.bank import Adapter
from moadapt.adapters.bottleneck import BottleneckBank
from moadapt.sites import Site
from moadapt_routers import Constant
from tests.conformance.canonical import routing_value
from tests.models import llava_batch, randomize, tiny_llava

ROWS, TOKENS, WIDTH = 4, 5, 8
SITE = Site("blocks.0.mlp", "language", "mlp", 0, WIDTH, WIDTH, "sublayer")
WIDTHS = {"shared": 3, "a": 2, "b": 5, "c": 1}
OPTIONS = [
    {"form": form, "norm": norm, "activation": activation, **scale}
    for form, norm, (activation, scale) in product(
        ("series", "parallel"),
        ("none", "before", "after"),
        (("gelu", {"scale": 0.3}), ("tanh", {"learn_scale": True, "scale": 4.0}), ("identity", {})),
    )
]
FUNCTIONS = {"gelu": functional.gelu, "relu": torch.relu, "silu": functional.silu, "tanh": torch.tanh}


def options_id(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values())


def build(options: dict[str, Any], widths: dict[str, int] = WIDTHS, *, fresh: bool = False) -> BottleneckBank:
    """A float64 bank, by default of random weights; the experts are those that are not called `shared`."""
    experts = [name for name in widths if name != "shared"]
    adapters = [
        Adapter(name, Bottleneck(width=m, **options), None if name == "shared" else experts.index(name))
        for name, m in widths.items()
    ]
    bank = Bottleneck.bank(SITE, adapters, nn.Linear(WIDTH, WIDTH)).double()
    for parameter in bank.parameters() if not fresh else ():
        nn.init.normal_(parameter)
    return bank


def normalised(values: Tensor, state: dict[str, Tensor]) -> Tensor:
    centred = values - values.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state["gain"] + state["shift"]


def one(state: dict[str, Tensor], options: dict[str, Any], read: Tensor) -> Tensor:
    """One adapter by itself."""
    if options["norm"] == "before":
        read = normalised(read, state)
    middle = FUNCTIONS.get(options["activation"], lambda x: x)(read @ state["down"].T + state["down_bias"])
    out = middle @ state["up"] + state["up_bias"]
    if options["norm"] == "after":
        out = normalised(out, state)
    return out * (state["scale"] if options.get("learn_scale") else options.get("scale", 1.0))


def naive(bank: BottleneckBank, leaves: Any, options: Any, x: Tensor, y: Tensor, routing: Routing | None) -> Tensor:
    total = torch.zeros_like(y)
    for i, name in enumerate(leaves):
        out = one(leaves[name], options, y if options["form"] == "series" else x)
        if name != "shared":
            assert routing is not None
            weight = routing.dense()[..., i - ("shared" in leaves)]
            out = weight.repeat_interleave(WIDTH // weight.shape[2], dim=2) * out
        total = total + out
    return total


@pytest.mark.parametrize("routing_name", ["constant", "task", "sequence_sparse", "token_dense", "heads"])
@pytest.mark.parametrize("options", OPTIONS, ids=options_id)
def test_a_bank_equals_the_loop_over_its_adapters(options: dict[str, Any], routing_name: str) -> None:
    bank = build(options)
    routing = routing_value(routing_name, rows=ROWS, tokens=TOKENS, dtype=torch.float64)
    routing.weights.requires_grad_()
    x, y, into = torch.randn(3, ROWS, TOKENS, WIDTH, dtype=torch.float64)
    x, y = x.requires_grad_(), y.requires_grad_()
    leaves = {
        name: {key: t.requires_grad_() for key, t in bank.state(name).items()} for name in ("shared", "a", "b", "c")
    }
    found, expected = bank(x, y, routing), naive(bank, leaves, options, x, y, routing)
    assert_close(found, expected)
    ours = torch.autograd.grad(
        found, (x, y, routing.weights, *bank.parameters()), into, allow_unused=True, materialize_grads=True
    )
    theirs = torch.autograd.grad(
        expected,
        (x, y, routing.weights, *(t for each in leaves.values() for t in each.values())),
        into,
        allow_unused=True,
        materialize_grads=True,
    )
    for one_of_ours, one_of_theirs in zip(ours[:3], theirs[:3], strict=True):
        assert_close(one_of_ours, one_of_theirs)
    stacks = dict(zip([name for name, _ in bank.named_parameters()], ours[3:], strict=True))
    keys, rest = list(leaves["a"]), theirs[3:]
    by_name = {name: dict(zip(keys, rest[len(keys) * i :], strict=False)) for i, name in enumerate(leaves)}
    for key in keys:
        assert_close(stacks[f"shared_{key}"], by_name["shared"][key])
        assert_close(stacks[f"expert_{key}"], torch.cat([by_name[name][key] for name in "abc"]))


@pytest.mark.parametrize("rows", [1, 2, 20])
def test_rows_do_not_meet(rows: int) -> None:
    bank = build({"form": "series", "norm": "after"})
    routing = routing_value("task", rows=rows, tokens=TOKENS, dtype=torch.float64)
    x, y = torch.randn(2, rows, TOKENS, WIDTH, dtype=torch.float64)
    found = bank(x, y, routing)
    for row in range(rows):
        alone = Routing.of_rows(torch.tensor([row % 3]), 3)
        assert_close(bank(x[row : row + 1], y[row : row + 1], alone)[0], found[row])


@pytest.mark.parametrize("options", OPTIONS, ids=options_id)
def test_it_starts_as_nothing_and_every_tensor_learns_within_two_steps(options: dict[str, Any]) -> None:
    bank = build(options, fresh=True)
    x, y = torch.randn(2, ROWS, TOKENS, WIDTH, dtype=torch.float64)
    routing = Routing.constant(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))
    assert torch.equal(bank(x, y, routing), torch.zeros_like(y))
    before = {name: p.detach().clone() for name, p in bank.named_parameters()}
    target = torch.randn_like(y)
    optimizer = torch.optim.SGD(bank.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (bank(x, y, routing) - target).square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in bank.named_parameters())


def test_in_series_behind_an_identity_it_is_the_parallel_one() -> None:
    series, parallel = (build({"form": form, "norm": "none"}) for form in ("series", "parallel"))
    for name in WIDTHS:
        parallel.load_state(name, series.state(name))
    x, other = torch.randn(2, ROWS, TOKENS, WIDTH, dtype=torch.float64)
    routing = routing_value("token_dense", rows=ROWS, tokens=TOKENS, dtype=torch.float64)
    assert torch.equal(series(other, x, routing), parallel(x, x, routing))


@pytest.mark.parametrize("norm", ["none", "before", "after"])
@pytest.mark.parametrize("learn_scale", [False, True])
def test_its_size_is_the_closed_form(norm: Any, learn_scale: bool) -> None:
    d, m = WIDTH, 5
    bank = build({"norm": norm, "learn_scale": learn_scale}, {"a": m})
    expected = 2 * d * m + m + d + (0 if norm == "none" else 2 * d) + learn_scale
    assert sum(p.numel() for p in bank.parameters()) == expected


def test_houlsby_sits_at_both_sublayers_and_pfeiffer_at_the_mlp() -> None:
    for style, ends in (("houlsby", {"self_attn", "mlp"}), ("pfeiffer", {"mlp"})):
        mixture = attach(tiny_llava(), shared=Bottleneck(style=style))  # type: ignore[arg-type]
        assert {site.path.rsplit(".", 1)[-1] for site in mixture.sites} == ends
        assert {site.layer for site in mixture.sites} == {0, 1, 2}


def test_adapters_of_other_options_stand_beside_each_other_at_a_site() -> None:
    """Two stacks at a site add up to what each adds by itself: both read the frozen output."""
    specs = {"a": Bottleneck(width=3), "b": Bottleneck(width=2, norm="after"), "c": Bottleneck(width=4, scale=0.5)}
    placement = Placement(kinds=("mlp",), depth=(0.0, 0.3))
    batch, base = llava_batch(), tiny_llava()
    mixture = attach(base, experts=specs, router=Constant(weights=(0.2, 0.5, 0.3)), placement=placement)
    randomize(mixture)
    (site, *_), banks = mixture.sites, [bank for _, bank in mixture.banks()]
    assert len(banks) == 3
    seen: dict[str, Tensor] = {}
    wrapper = base.get_submodule(site.path)
    wrapper.module.register_forward_hook(lambda module, args, out: seen.update(x=args[0], y=out))
    wrapper.register_forward_hook(lambda module, args, out: seen.update(out=out))
    with torch.no_grad():
        mixture(**batch)
        routing = Routing.constant(torch.tensor([0.2, 0.5, 0.3]))
        expected = seen["y"] + sum(bank(seen["x"], seen["y"], routing) for bank in banks)
    assert torch.allclose(seen["out"], expected, rtol=1e-6, atol=1e-6)


def test_it_cannot_be_merged_and_says_where_and_why() -> None:
    with pytest.raises(NotMergeable, match=r"blocks\.0\.mlp: .* activation"):
        build({}).delta(torch.ones(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width=0"),
        ({"scale": 0.0}, "scale=0"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"form": "serial"}, "form='serial'; choose from series, parallel"),
        ({"style": "lora"}, "style='lora'; choose from houlsby, pfeiffer"),
        ({"activation": "sign"}, "activation='sign'; choose from gelu"),
        ({"norm": "both"}, "norm='both'; choose from none, before, after"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bottleneck(**options)


def test_routing_heads_that_do_not_divide_the_width_are_refused() -> None:
    routing = Routing(torch.rand(ROWS, 1, 3, 3, dtype=torch.float64), 3)
    for norm in ("none", "after"):
        with pytest.raises(ValueError, match=r"blocks\.0\.mlp: 3 routing heads do not divide"):
            build({"norm": norm})(*torch.randn(2, ROWS, TOKENS, WIDTH, dtype=torch.float64), routing)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("learned_first", [True, False])
def test_learned_and_fixed_scales_keep_apart(learned_first: bool) -> None:
    specs = {"learned": Bottleneck(learn_scale=True), "fixed": Bottleneck()}
    order = list(specs) if learned_first else list(specs)[::-1]
    mixture = attach(tiny_llava(), experts={n: specs[n] for n in order}, router=Constant(weights=(0.5, 0.5)))
    for _, bank in mixture.banks():
        (name,) = bank.names
        assert ("scale" in bank.state(name)) == (name == "learned")
