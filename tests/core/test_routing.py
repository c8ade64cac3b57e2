"""Routing values, what a router looks at, and what a router spec refuses."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from moadapt import Router, RouterSpec, Routing, RoutingContext
from moadapt.router import Scope, mask_unavailable
from moadapt_routers import ByTask, Constant, Softmax, TopK
from tests.conformance.canonical import ROUTING_NAMES, routing_value

ROWS, TOKENS, EXPERTS, WIDTH = 3, 5, 4, 6


@dataclass(frozen=True, kw_only=True)
class BySequence(RouterSpec):
    scopes: ClassVar[tuple[Scope, ...]] = ("sequence",)

    def build(self, dim: int, num_experts: int) -> Router:
        raise NotImplementedError


def test_dense_weights_put_every_choice_in_its_place() -> None:
    indices = torch.tensor([[0, 3], [2, 1]]).reshape(2, 1, 1, 2)
    weights = torch.tensor([[0.75, 0.25], [0.5, 2.0]]).reshape(2, 1, 1, 2)
    expected = torch.tensor([[0.75, 0, 0, 0.25], [0, 2.0, 0.5, 0]]).reshape(2, 1, 1, 4)
    assert torch.equal(Routing(weights, EXPERTS, indices).dense(), expected)
    assert torch.equal(Routing(expected, EXPERTS).dense(), expected)


def test_an_expert_chosen_twice_counts_twice() -> None:
    indices = torch.tensor([1, 1]).reshape(1, 1, 1, 2)
    routing = Routing(torch.tensor([0.5, 0.25]).reshape(1, 1, 1, 2), EXPERTS, indices)
    assert routing.dense().flatten().tolist() == [0, 0.75, 0, 0]


def test_gradients_reach_sparse_weights() -> None:
    weights = torch.rand(ROWS, TOKENS, 1, 2, requires_grad=True)
    indices = torch.tensor([0, 3]).expand(ROWS, TOKENS, 1, 2)
    scale = torch.arange(1.0, EXPERTS + 1)
    (Routing(weights, EXPERTS, indices).dense() * scale).sum().backward()
    assert torch.equal(weights.grad, torch.tensor([1.0, 4.0]).expand_as(weights))


@pytest.mark.parametrize("name", ROUTING_NAMES)
def test_axes_are_one_where_nothing_depends_on_them(name: str) -> None:
    routing = routing_value(name, rows=ROWS, tokens=TOKENS, experts=EXPERTS)
    assert routing.per_row is (name != "constant")
    assert routing.per_token is name.startswith("token")
    assert routing.dense().shape[-1] == routing.num_experts == EXPERTS
    assert routing.combines == ("parameters" if name == "blended" else "outputs")


@pytest.mark.parametrize("shape", [(EXPERTS,), (ROWS, EXPERTS), (ROWS, 1, EXPERTS), (ROWS, 1, 1, EXPERTS - 1)], ids=str)
def test_weights_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"routing weights have shape \(.*\); expected \(B\|1, T\|1, H\|1, 4\), or"):
        Routing(torch.ones(shape), EXPERTS)


def test_indices_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"indices have shape \(3, 1, 1, 1\), but the weights have \(3, 1, 1, 2\)"):
        Routing(torch.ones(ROWS, 1, 1, 2), EXPERTS, torch.zeros(ROWS, 1, 1, 1, dtype=torch.long))


def test_rows_are_repeated_in_place_for_beams() -> None:
    parts = {
        "weights": torch.rand(ROWS, 1, 1, 2),
        "indices": torch.randint(EXPERTS, (ROWS, 1, 1, 2)),
        "logits": torch.rand(ROWS, 1, 1, EXPERTS),
        "log_prob": torch.rand(ROWS, 1, 1),
    }
    repeated = Routing(num_experts=EXPERTS, combines="parameters", **parts).repeat_rows(2)
    for name, tensor in parts.items():
        expected = torch.stack([row for row in tensor for _ in range(2)])
        assert torch.equal(getattr(repeated, name), expected), name
    assert repeated.combines == "parameters"


def test_one_repetition_and_rows_that_do_not_differ_stay() -> None:
    for routing, times in ((routing_value("sequence_sparse", rows=ROWS, tokens=1), 1), (_constant(), 4)):
        assert routing.repeat_rows(times) is routing


def test_a_detached_routing_keeps_values_and_drops_the_graph() -> None:
    weights = torch.rand(ROWS, 1, 1, 2, requires_grad=True) * 2
    indices = torch.randint(EXPERTS, (ROWS, 1, 1, 2))
    given = Routing(
        weights, EXPERTS, indices, "parameters", logits=weights.repeat(1, 1, 1, 2), log_prob=weights[..., 0]
    )
    found = given.detached()
    assert torch.equal(found.weights, weights)
    assert not found.weights.requires_grad
    assert (found.indices, found.combines, found.logits, found.log_prob) == (indices, "parameters", None, None)


def test_tokens_are_normalised_in_float32() -> None:
    hidden = (torch.randn(ROWS, TOKENS, WIDTH) * 7 + 3).bfloat16()
    exact = hidden.double()
    expected = (exact - exact.mean(-1, keepdim=True)) / (exact.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    found = RoutingContext(hidden).tokens
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def by_loop(context: RoutingContext) -> Tensor:
    """The mean of the means over a row's text prompt and over its image prompt, of those that exist."""
    tokens, rows = context.tokens, []
    prompt = torch.ones(tokens.shape[:2], dtype=torch.bool) if context.prompt is None else context.prompt
    image = torch.zeros_like(prompt) if context.image is None else context.image
    for row in range(len(tokens)):
        kinds = [tokens[row, prompt[row] & kind] for kind in (~image[row], image[row])]
        means = [kind.mean(dim=0) for kind in kinds if len(kind)]
        rows.append(torch.stack(means).mean(dim=0) if means else torch.zeros(tokens.shape[-1]))
    return torch.stack(rows)


@pytest.mark.parametrize("with_image", [True, False])
@pytest.mark.parametrize("with_prompt", [True, False])
def test_pooling_averages_text_and_image_apart(with_prompt: bool, with_image: bool) -> None:
    prompt = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]]).bool()
    image = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]).bool()
    context = RoutingContext(
        torch.randn(4, TOKENS, WIDTH), prompt if with_prompt else None, image if with_prompt and with_image else None
    )
    torch.testing.assert_close(context.pooled, by_loop(context))


def test_pooling_reads_prompt_tokens_only() -> None:
    prompt = torch.tensor([[1, 1, 0, 0, 0]]).bool().expand(ROWS, -1)
    hidden = torch.randn(ROWS, TOKENS, WIDTH)
    other = torch.where(prompt.unsqueeze(-1), hidden, torch.randn_like(hidden))
    assert torch.equal(RoutingContext(hidden, prompt).pooled, RoutingContext(other, prompt).pooled)


def test_experts_that_are_not_available_get_no_weight() -> None:
    logits, available = torch.randn(ROWS, 1, 1, EXPERTS), torch.tensor([True, False, True, False])
    masked = mask_unavailable(logits, available).softmax(dim=-1)
    assert not masked[..., ~available].any()
    torch.testing.assert_close(masked[..., available], logits[..., available].softmax(dim=-1))
    assert mask_unavailable(logits, None) is logits


@pytest.mark.parametrize("spec", [ByTask(), Constant(), Softmax(), TopK(k=2), TopK(k=3)], ids=str)
def test_routers_choose_among_available_experts_only(spec: RouterSpec) -> None:
    router = spec.build(WIDTH, EXPERTS)
    available = torch.tensor([True, False, True, False])
    context = RoutingContext(torch.randn(4, TOKENS, WIDTH), task_ids=torch.arange(4), available=available)
    weights = router(context).dense()
    assert not weights[..., ~available].any()
    assert weights[..., available].any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scope": "token"}, "BySequence routes by sequence, not by 'token'; change scope"),
        ({"scope": "batch"}, "BySequence routes by sequence, not by 'batch'; change scope"),
        ({"per": "block"}, "BySequence got per='block'; choose one of model, tower, layer, site"),
    ],
)
def test_a_scope_or_place_that_a_router_has_not_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BySequence(**given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Softmax(temperature=0.0), "Softmax got temperature=0.0; it must be above 0"),
        (lambda: Softmax(temperature=float("nan")), "Softmax got temperature=nan; it must be above 0"),
        (lambda: TopK(k=0), "TopK got k=0; it must be at least 1"),
        (lambda: TopK(k=5).build(WIDTH, EXPERTS), "TopK needs 5 experts or more, but there are 4; choose fewer"),
        (lambda: Constant(weights=(1.0,)).build(WIDTH, EXPERTS), "Constant got 1 weights for 4 experts; give one"),
        (lambda: TopK(k=3).build(WIDTH, EXPERTS).trim([0, 1]), "cannot go on with 2 experts; keep at least 3"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("spec", [ByTask(), Constant(), Softmax(), TopK()], ids=str)
def test_growing_and_trimming_keep_the_bits_of_the_others(spec: RouterSpec) -> None:
    router = spec.build(WIDTH, EXPERTS)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    context = RoutingContext(torch.randn(ROWS, TOKENS, WIDTH), task_ids=torch.tensor([0, 3, 1]))
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    dense = router(context).dense()
    router.grow(2)
    assert router(context).dense().shape[-1] == EXPERTS + 2
    for name, tensor in router.state_dict().items():
        assert torch.equal(tensor[:EXPERTS], before[name]), name
    router.trim([3, 1, 0, 2])
    for name, tensor in router.state_dict().items():
        assert torch.equal(tensor, before[name][[3, 1, 0, 2]]), name
    context = RoutingContext(context.hidden, task_ids=torch.tensor([2, 0, 1]))  # the same tasks under their new numbers
    torch.testing.assert_close(router(context).dense(), dense[..., [3, 1, 0, 2]])


def _constant() -> Routing:
    return Routing.constant(torch.rand(EXPERTS))


def test_constant_weights_of_whole_numbers_are_floating_point() -> None:
    router = Constant(weights=(1, 3)).build(WIDTH, 2)
    weights = router(RoutingContext()).weights
    assert weights.dtype == torch.float32
    assert weights.flatten().tolist() == [1.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_weights_that_are_no_floating_point_numbers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"routing weights are {dtype} of shape \(1, 1, 1, 2\).*weights\.float\(\)"):
        Routing.constant(torch.ones(2, dtype=dtype))
