"""Laws 3 and 4 for prompts of every make: image first, text first, two images in a row, none."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt import RouterSpec
from tests.conformance.canonical import (
    EVERYWHERE,
    LANGUAGE,
    TASKS,
    exact,
    is_legal,
    label,
    make,
    router_specs,
    weights_by_place,
)
from tests.models import IMAGE_TOKEN, PATCHES, llava_batch, padded, prompt_of, rows_of, uneven_images, unpadded

ROWS, ANSWER, NEW = 3, 4, 4
FIXED = {"min_new_tokens": NEW, "max_new_tokens": NEW, "pad_token_id": 0, "suppress_tokens": [IMAGE_TOKEN]}
LAYOUTS = ("image first", "text first", "image within", "two images", "no image")


def laid_out(layout: str, *, answer: bool = True) -> dict[str, Tensor]:
    """A batch whose rows all have this layout; two images mean four pictures of two a row for two rows."""
    rows = 2 if layout == "two images" else ROWS
    images = {"two images": 2, "no image": 0}.get(layout, 1)
    batch = llava_batch(rows)
    text, image = batch["input_ids"][:, PATCHES:], batch["input_ids"][:, :PATCHES]
    prompt, answers = text[:, :-ANSWER], text[:, -ANSWER:]
    parts = {
        "image first": [image, prompt],
        "text first": [prompt, image],
        "image within": [prompt[:, :2], image, prompt[:, 2:]],
        "two images": [image, prompt[:, :2], image, prompt[:, 2:]],
        "no image": [prompt],
    }[layout]
    ids = torch.cat([*parts, answers] if answer else parts, dim=1)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        pixels = torch.Generator().manual_seed(4)
        found["pixel_values"] = torch.randn(rows * images, 3, 16, 16, generator=pixels)
    if answer:
        found["labels"] = torch.full_like(ids, -100)
        found["labels"][:, -ANSWER:] = answers
    return found


def tasks_of(batch: dict[str, Tensor]) -> list[str]:
    return TASKS[: len(batch["input_ids"])]


def alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Take one row and its images out of a batch."""
    text = {name: tensor for name, tensor in batch.items() if name != "pixel_values"}
    if "pixel_values" not in batch:
        return rows_of(text, row)
    each = len(batch["pixel_values"]) // len(batch["input_ids"])
    return {**rows_of(text, row), "pixel_values": batch["pixel_values"][row * each : (row + 1) * each]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("router", list(router_specs(scope="sequence", depends_on="input")), ids=label)
def test_sequence_routing_sees_its_own_prompt_alone(router: RouterSpec, layout: str) -> None:
    mixture, batch = make(router, LANGUAGE), laid_out(layout)
    expected = weights_by_place(mixture, **batch, task=tasks_of(batch))
    assert expected
    answers = batch["labels"] != -100
    other = torch.where(answers, (batch["input_ids"] + 9) % 40 + 6, batch["input_ids"])
    changed = {
        "answers": {**batch, "input_ids": other},
        "left": padded(batch, 3, "left"),
        "right": padded(batch, 2, "right"),
    }
    for what, inputs in changed.items():
        found = weights_by_place(mixture, **inputs, task=tasks_of(batch))
        for place, weights in expected.items():
            torch.testing.assert_close(found[place], weights, rtol=0, atol=1e-5, msg=f"{what} at {place}")
    for row, task in enumerate(tasks_of(batch)):
        for place, weights in weights_by_place(mixture, **alone(batch, row), task=task).items():
            torch.testing.assert_close(expected[place][row : row + 1], weights, rtol=0, atol=1e-5, msg=place)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("router", list(router_specs()), ids=label)
def test_a_cache_changes_no_token_of_any_prompt(router: RouterSpec, layout: str) -> None:
    mixture, prompt = make(router, LANGUAGE), laid_out(layout, answer=False)
    prompt = padded(prompt, 2, "left")
    given: dict[str, Any] = {**prompt, "task": tasks_of(prompt), "do_sample": False, **FIXED}
    for beams in (1, 2):
        cached, whole = (mixture.generate(**given, num_beams=beams, use_cache=each) for each in (True, False))
        assert torch.equal(cached, whole), f"{beams} beams"
    assert len({tuple(row) for row in cached.tolist()}) > 1


@pytest.mark.parametrize("router", [r for r in router_specs() if is_legal(r, EVERYWHERE)], ids=label)
def test_rows_of_any_number_of_images_are_routed_as_each_alone(router: RouterSpec) -> None:
    mixture, prompt = make(router, EVERYWHERE), uneven_images(prompt_of(llava_batch()))
    mixture.double()
    pixels = prompt.pop("pixel_values")
    with torch.no_grad():
        together = mixture(**exact({**prompt, "pixel_values": pixels}), task=TASKS).logits
        for row, own in enumerate([{"pixel_values": pixels[:2]}, {}, {"pixel_values": pixels[2:]}]):
            alone = mixture(**exact({**unpadded(prompt, row), **own}), task=TASKS[row]).logits
            torch.testing.assert_close(together[row, -1], alone[0, -1], rtol=1e-4, atol=1e-4)  # weights are float32
