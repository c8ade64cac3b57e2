"""Law 3: a row's routing sees that row's prompt and image, a token's only its past."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt import RouterSpec, attach
from moadapt.adapters import FamilySpec
from tests.conformance.canonical import (
    FAMILY_PARAMS,
    LANGUAGE,
    TASKS,
    Placement,
    exact,
    label,
    make,
    router_cases,
    router_specs,
    weights_by_place,
)
from tests.models import PATCHES, VOCABULARY, llava_batch, padded, prompt_of, rows_of, tiny_llama, tiny_llava

SEQUENCE = router_cases(scope="sequence")
READING = router_cases(scope="sequence", depends_on="input")
TOKEN = router_cases(scope="token")
PROMPT = 5
OF_PLACES = [r for r in router_specs(depends_on="input") if r.per != "model" and r.reads == "place"]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal weights up to rounding, so the same experts, except such as are nearly at 0."""
    assert found.keys() == expected.keys()
    for place, weights in expected.items():
        torch.testing.assert_close(found[place], weights, rtol=0, atol=1e-5, msg=place)


def other_tokens(ids: Tensor) -> Tensor:
    """Tokens that differ from these everywhere; image tokens stay."""
    text = (ids - 5 + torch.randint(1, VOCABULARY - 5, ids.shape)) % (VOCABULARY - 5) + 5
    return torch.where(ids >= 5, text, ids)


@pytest.mark.parametrize(("router", "placement"), READING)
def test_rows_get_different_weights(router: RouterSpec, placement: Placement) -> None:
    """Judged by what weights are made of, as routers that choose may choose alike."""
    mixture = make(router, placement)
    with torch.no_grad(), mixture.observe() as found:
        mixture(**llava_batch(), task=TASKS)
    assert found
    for each in found:
        made_of = each.routing.dense() if each.routing.logits is None else each.routing.logits
        assert made_of.shape == (3, 1, 1, 3)
        assert (made_of[0] - made_of[1]).abs().max() > 1e-4


@pytest.mark.parametrize(("router", "placement"), SEQUENCE)
def test_sequence_routing_is_blind_to_answers(router: RouterSpec, placement: Placement) -> None:
    mixture, batch = make(router, placement), llava_batch()
    ids = batch["input_ids"].clone()
    ids[:, PATCHES + PROMPT :] = other_tokens(ids[:, PATCHES + PROMPT :])
    changed = {**batch, "input_ids": ids, "labels": torch.where(batch["labels"] == -100, -100, ids)}
    expected = weights_by_place(mixture, **batch, task=TASKS)
    assert_same(weights_by_place(mixture, **changed, task=TASKS), expected)
    assert_same(weights_by_place(mixture, **prompt_of(batch), task=TASKS), expected)


@pytest.mark.parametrize(("router", "placement"), SEQUENCE)
def test_a_prompt_mask_does_what_labels_do(router: RouterSpec, placement: Placement) -> None:
    mixture, batch = make(router, placement), llava_batch()
    expected = weights_by_place(mixture, **batch, task=TASKS)
    mask = batch.pop("labels") == -100
    assert_same(weights_by_place(mixture, **batch, prompt_mask=mask, task=TASKS), expected)


@pytest.mark.parametrize(("router", "placement"), SEQUENCE)
def test_sequence_routing_is_blind_to_other_rows(router: RouterSpec, placement: Placement) -> None:
    mixture, batch = make(router, placement), llava_batch()
    alone = weights_by_place(mixture, **rows_of(batch, 0), task=TASKS[0])
    others = rows_of(llava_batch(seed=9), 0, 1, 2)
    mixed = {name: torch.cat([batch[name][:1], others[name][1:]]) for name in batch}
    for rows in (batch, mixed):
        found = weights_by_place(mixture, **rows, task=TASKS)
        assert_same({place: w[:1] for place, w in found.items()}, alone)


@pytest.mark.parametrize("amount", [1, 4])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("router", "placement"), SEQUENCE)
def test_sequence_routing_is_blind_to_padding(router: RouterSpec, placement: Placement, side: str, amount: int) -> None:
    mixture, batch = make(router, placement), llava_batch()
    expected = weights_by_place(mixture, **batch, task=TASKS)
    assert_same(weights_by_place(mixture, **padded(batch, amount, side), task=TASKS), expected)


@pytest.mark.parametrize("router", OF_PLACES, ids=label)
def test_vision_routing_is_blind_to_the_number_of_tokens(router: RouterSpec) -> None:
    """A call with as many tokens as patches must not take one for the other."""
    mixture, batch = make(router), prompt_of(llava_batch())
    expected = {p: w for p, w in weights_by_place(mixture, **batch).items() if "language" not in p}
    assert expected
    for length in range(PATCHES + 1, PATCHES + 4):
        short = {n: t if n == "pixel_values" else t[:, :length] for n, t in batch.items()}
        found = weights_by_place(mixture, **short)
        assert_same({place: found[place] for place in expected}, expected)


@pytest.mark.parametrize(("router", "placement"), TOKEN)
def test_token_routing_sees_only_its_past(router: RouterSpec, placement: Placement) -> None:
    mixture, batch = make(router, placement), llava_batch()
    expected = weights_by_place(mixture, **batch, task=TASKS)
    for start in (PATCHES + 1, PATCHES + PROMPT, batch["input_ids"].shape[1] - 1):
        ids = batch["input_ids"].clone()
        ids[:, start:] = other_tokens(ids[:, start:])
        found = weights_by_place(mixture, **{**batch, "input_ids": ids}, task=TASKS)
        assert_same(*(_past(weights, start) for weights in (found, expected)))
        later = {place: weights for place, weights in found.items() if _over_tokens(weights)}
        assert later
        assert all((weights[:, start:] - expected[p][:, start:]).abs().max() > 1e-4 for p, weights in later.items())


@pytest.mark.parametrize(("router", "placement"), TOKEN)
def test_token_routing_is_blind_to_other_rows_and_padding(router: RouterSpec, placement: Placement) -> None:
    mixture, batch = make(router, placement), llava_batch()
    expected = weights_by_place(mixture, **batch, task=TASKS)
    alone = weights_by_place(mixture, **rows_of(batch, 0), task=TASKS[0])
    assert_same({place: weights[:1] for place, weights in expected.items()}, alone)
    for side, real in (("left", slice(2, None)), ("right", slice(0, -2))):
        found = weights_by_place(mixture, **padded(batch, 2, side), task=TASKS)
        kept = {p: w[:, real] if w.shape[1] != expected[p].shape[1] else w for p, w in found.items()}
        assert_same(kept, expected)


@pytest.mark.parametrize(("router", "placement"), READING)
def test_labels_on_the_prompt_are_refused(router: RouterSpec, placement: Placement) -> None:
    mixture, batch = make(router, placement), llava_batch()
    prompt = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    with pytest.raises(ValueError, match=r"labels lie on prompt tokens.*smaller prompt_mask"):
        mixture(**batch, prompt_mask=prompt)
    assert mixture.context.call is None


@pytest.mark.parametrize("given", ["labels", "prompt_mask", "attention_mask"])
@pytest.mark.parametrize(("router", "placement"), READING)
def test_an_empty_prompt_is_refused(router: RouterSpec, placement: Placement, given: str) -> None:
    mixture, batch = make(router, placement), llava_batch()
    labels, extra = batch.pop("labels"), dict[str, Any]()
    if given == "labels":
        extra["labels"] = labels.clone()
        extra["labels"][1] = batch["input_ids"][1]
    elif given == "prompt_mask":
        extra["prompt_mask"] = torch.ones_like(labels).bool()
        extra["prompt_mask"][1] = False
    else:
        batch["attention_mask"][1] = 0
    with pytest.raises(ValueError, match=r"rows \[1\] have no prompt token"):
        mixture(**batch, **extra)


@pytest.mark.parametrize("router", list(router_specs(scope="token")), ids=label)
def test_labels_anywhere_are_fine_where_no_prompt_is_read(router: RouterSpec) -> None:
    batch = llava_batch()
    mixture = make(router, Placement())
    assert mixture(**{**batch, "labels": batch["input_ids"]}).loss.isfinite()


@pytest.mark.parametrize("family", FAMILY_PARAMS)
def test_no_token_of_an_answer_is_read_before_it_or_the_tower_is_refused(family: type[FamilySpec]) -> None:
    if not family.causal:
        with pytest.raises(ValueError, match=r"can sit at none of .* attention is causal there.*place it where"):
            attach(tiny_llava(), shared=family())
        return
    mixture, batch = make(None, LANGUAGE, family=family, base=tiny_llava().double()).double(), exact(llava_batch())
    start = PATCHES + PROMPT + 1
    ids = batch["input_ids"].clone()
    ids[:, start:] = other_tokens(ids[:, start:])
    with torch.no_grad():
        expected, found = (mixture(**{**batch, "input_ids": each}).logits for each in (batch["input_ids"], ids))
    torch.testing.assert_close(found[:, :start], expected[:, :start], rtol=1e-10, atol=1e-10)


def _over_tokens(weights: Tensor) -> bool:
    return weights.shape[1] == PATCHES + PROMPT + 4


def _past(found: dict[str, Tensor], start: int) -> dict[str, Tensor]:
    """Weights before a position; patches of a vision tower are all in the past."""
    return {place: weights[:, :start] if _over_tokens(weights) else weights for place, weights in found.items()}


@pytest.mark.parametrize("router", list(router_specs(scope="sequence", depends_on="input")), ids=label)
def test_what_enters_the_head_is_not_read_by_sequence(router: RouterSpec) -> None:
    """With `logits_to_keep` the head sees the last tokens only, which are those of the answer."""
    heads = Placement(kinds=("other",))
    if router in OF_PLACES and router.per != "tower":
        with pytest.raises(
            ValueError, match=r'read the input of lm_head, which lies outside.*use per="tower" or "model"'
        ):
            make(router, heads, base=tiny_llama())
        return
    mixture, batch = make(router, heads, base=tiny_llama()), llava_batch()
    del batch["pixel_values"]
    expected = weights_by_place(mixture, **batch)
    ids = batch["input_ids"].clone()
    ids[:, PATCHES + PROMPT :] = other_tokens(ids[:, PATCHES + PROMPT :])
    labels = batch.pop("labels")
    found = weights_by_place(mixture, **{**batch, "input_ids": ids}, prompt_mask=labels == -100, logits_to_keep=2)
    assert_same(found, expected)
