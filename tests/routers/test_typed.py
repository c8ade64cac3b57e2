"""Typed experts: what an input has nothing of gets no weight, and general experts keep their share."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt import Placement, RoutingContext
from moadapt_routers import Typed
from moadapt_routers.logit_router import LogitRouter
from tests.conformance.canonical import EVERYWHERE, TASKS, make, weights_by_place
from tests.conformance.test_families import generate
from tests.models import PATCHES, llava_batch, prompt_of, ragged_prompts, rows_of, uneven_images, unpadded

KINDS = ("image", "text", "image_rows")
IMAGE = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()


def seen(**more: Any) -> RoutingContext:
    """Two rows of five tokens, the first with an image behind its first token."""
    given = {
        "hidden": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)),
        "prompt": torch.ones(2, 5, dtype=torch.bool),
        "real": torch.ones(2, 5, dtype=torch.bool),
        "image": IMAGE,
        "with_image": torch.tensor([True, False]),
    }
    return RoutingContext(**{**given, **more})


def router(*types: Any, experts: int | None = None, **options: Any) -> LogitRouter:
    torch.manual_seed(0)
    built = Typed(types=types, **options).build(8, len(types) if experts is None else experts)
    torch.nn.init.normal_(built.linear.weight)
    return built


def shown(weights: Tensor, expert: int) -> list[str]:
    """Which tokens an expert serves, a row as a word of 0 and 1."""
    return ["".join(str(int(token)) for token in row) for row in weights[:, :, 0, expert] > 0]


def test_experts_serve_the_tokens_of_their_type() -> None:
    weights = router(*KINDS, "any", scope="token")(seen()).weights
    assert shown(weights, 0) == ["01100", "00000"]
    assert shown(weights, 1) == ["10011", "11111"]
    assert shown(weights, 2) == ["01111", "00000"]
    assert shown(weights, 3) == ["11111", "11111"]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5, 1))


def test_experts_serve_the_rows_of_their_type() -> None:
    weights = router(*KINDS, "any", scope="sequence")(seen()).weights
    assert [shown(weights, expert) for expert in range(4)] == [["1", "0"], ["1", "1"], ["1", "0"], ["1", "1"]]


def test_in_a_vision_tower_every_token_is_one_of_an_image() -> None:
    weights = router(*KINDS, scope="token")(RoutingContext(hidden=torch.randn(2, 5, 8), tower="vision")).weights
    assert [shown(weights, expert)[0] for expert in range(3)] == ["11111", "00000", "11111"]


@pytest.mark.parametrize("floor", [0.0, 0.4])
def test_where_no_type_is_present_nothing_acts_and_gradients_are_finite(floor: float) -> None:
    built = router("image", "any", scope="token", floor=floor)
    routing = built(seen(available=torch.tensor([True, False])))
    assert torch.equal(routing.weights[..., 0] > 0, IMAGE.unsqueeze(2))
    assert not routing.weights[~IMAGE].any()
    (routing.weights**2).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in built.parameters())


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_general_experts_keep_their_floor(scope: Any) -> None:
    free = router("image", "any", "text", "any", scope=scope)
    with torch.no_grad():
        free.linear.bias[:] = torch.tensor([9.0, -9.0, 9.0, -9.0])  # type: ignore[index]
    floored = LogitRouter(Typed(types=free.spec.types, scope=scope, floor=0.3), free.linear)  # type: ignore[attr-defined]
    general = [1, 3]
    assert free(seen()).weights[..., general].sum(-1).min() < 0.1
    weights = floored(seen()).weights
    assert weights[..., general].sum(-1).min() > 0.3 - 1e-6
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


def test_it_anneals_to_one_expert() -> None:
    built = router("text", "any", "image", "any", scope="token", temperature=2.0, end_temperature=1e-4)
    soft, sharp = (built(seen(progress=torch.tensor(share))).weights for share in (0.0, 1.0))
    assert soft.max() < 0.999
    assert torch.equal(sharp.amax(-1) > 0.999, torch.ones(2, 5, 1, dtype=torch.bool))
    assert torch.equal(sharp, built(seen()).weights)  # when training is over
    half = built(seen(progress=torch.tensor(0.5)))
    torch.testing.assert_close(half.logits, built.linear(seen().tokens).unsqueeze(2) / (2.0 * 1e-4) ** 0.5)


def test_growing_and_trimming_keep_the_types() -> None:
    built = router("image", "text", scope="token")
    built.grow(1)
    assert shown(built(seen()).weights, 2) == ["11111", "11111"]
    built.trim([2, 0])
    assert [shown(built(seen()).weights, expert) for expert in (0, 1)] == [["11111", "11111"], ["01100", "00000"]]


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_a_cache_changes_no_token_whatever_the_types(scope: Any) -> None:
    for prompt in (ragged_prompts(), uneven_images(prompt_of(llava_batch()))):
        mixture = make(Typed(types=KINDS, scope=scope), Placement())
        cached = generate(mixture, prompt)
        assert torch.equal(cached, generate(mixture, prompt, use_cache=False))
    mixture, prompt = make(Typed(types=KINDS, scope=scope), EVERYWHERE), ragged_prompts()
    alone = [generate(mixture, unpadded(prompt, row), TASKS[row]) for row in range(3)]
    assert torch.equal(generate(mixture, prompt), torch.cat(alone))


def test_no_token_knows_of_a_later_image() -> None:
    mixture, batch = make(Typed(types=KINDS, scope="token"), Placement()), rows_of(prompt_of(llava_batch()), 0)
    order = [*range(PATCHES, PATCHES + 5), *range(PATCHES)]  # the image last
    last = {**batch, "input_ids": batch["input_ids"][:, order]}
    without = {"input_ids": last["input_ids"][:, :5], "attention_mask": last["attention_mask"][:, :5]}
    expected = weights_by_place(mixture, **without)
    for place, weights in weights_by_place(mixture, **last).items():
        torch.testing.assert_close(weights[:, :5], expected[place], rtol=0, atol=1e-5)
        assert weights[:, 5:, :, 2].min() > 0


def test_embeddings_that_do_not_tell_images_are_refused() -> None:
    mixture = make(Typed(types=KINDS, scope="token"), Placement())
    with pytest.raises(ValueError, match=r"tells text and image tokens apart, and inputs_embeds does not"):
        mixture(inputs_embeds=torch.randn(1, 5, 32))


@pytest.mark.parametrize(
    ("options", "experts", "message"),
    [
        ({"types": ("picture",)}, 1, "types are any, image, text, image_rows"),
        ({"floor": 1.5}, 2, "the floor from 0 to 1"),
        ({"types": ("any",) * 3}, 2, "3 types for 2 experts"),
        ({"types": ("image", "text"), "floor": 0.1}, 2, "no expert of type any"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], experts: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Typed(**options).build(8, experts)
