"""Cross-modal adapters in whole models: no leak, the same with a cache and without, on many vision-language classes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt import Mixture, RouterSpec, attach
from moadapt.adapters import CrossModal, LoRA
from moadapt_routers import ByTask, Softmax
from tests.conformance.canonical import TASKS
from tests.core.zoo import build
from tests.models import (
    IMAGE_TOKEN,
    PATCHES,
    llava_batch,
    padded,
    prompt_of,
    ragged_prompts,
    randomize,
    tiny_llava,
    uneven_images,
)

PROMPT, NEW = 5, 5
ROUTERS: dict[str, RouterSpec | None] = {
    "shared": None,
    "task": ByTask(),
    "sequence": Softmax(),
    "token": Softmax(scope="token"),
}
over_routers = pytest.mark.parametrize("how", ROUTERS)


def mixture_of(how: str, base: Any = None) -> Mixture:
    """A mixture of trained adapters that differ in rank, direction and family."""
    experts = {
        "ask": CrossModal(rank=3),
        "tell": CrossModal(rank=2, directions=("text_to_image",)),
        "find": LoRA(rank=2),
    }
    router = ROUTERS[how]
    mixture = attach(
        tiny_llava() if base is None else base,
        shared=CrossModal(rank=2, pooled=True),
        experts=experts if router else None,
        router=router,
    )
    randomize(mixture)
    return mixture.eval()


def text_first(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put two tokens of the question before the image."""
    order = [PATCHES, PATCHES + 1, *range(PATCHES), *range(PATCHES + 2, batch["input_ids"].shape[1])]
    return {name: t if name == "pixel_values" else t[:, order] for name, t in batch.items()}


PROMPTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "ragged": ragged_prompts,
    "text_first": lambda: text_first(prompt_of(llava_batch())),
    "uneven_images": lambda: uneven_images(prompt_of(llava_batch())),
}


def outputs(mixture: Mixture, batch: dict[str, Tensor], **how: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = mixture(**batch, task=TASKS, **how).logits
    return found


def generate(mixture: Mixture, prompt: dict[str, Tensor], **how: Any) -> Tensor:
    torch.manual_seed(0)
    fixed = {"min_new_tokens": NEW, "max_new_tokens": NEW, "pad_token_id": 0, "suppress_tokens": [IMAGE_TOKEN]}
    found: Tensor = mixture.generate(**prompt, task=TASKS, **fixed, **how)
    return found[:, prompt["input_ids"].shape[1] :]


@pytest.mark.parametrize("arrange", [dict, text_first], ids=["image_first", "text_first"])
@over_routers
def test_no_token_sees_a_later_one_that_is_no_prompt(how: str, arrange: Any) -> None:
    mixture, batch = mixture_of(how), arrange(llava_batch())
    expected = outputs(mixture, batch)
    for start in range(PATCHES + PROMPT, batch["input_ids"].shape[1]):
        ids = batch["input_ids"].clone()
        ids[:, start:] = (ids[:, start:] - 4) % 60 + 5
        found = outputs(mixture, {**batch, "input_ids": ids})
        torch.testing.assert_close(found[:, :start], expected[:, :start], rtol=0, atol=1e-5)
        assert (found[:, start:] - expected[:, start:]).abs().amax() > 1e-2
    cut = outputs(mixture, prompt_of(batch))
    torch.testing.assert_close(cut, expected[:, : PATCHES + PROMPT], rtol=0, atol=1e-5)


@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text"])
def test_images_see_the_question_only_through_an_open_gate(direction: Any) -> None:
    """The image comes first, so that the base's own attention shows it nothing of the question."""
    mixture, batch = attach(tiny_llava(), shared=CrossModal(directions=(direction,))), llava_batch()
    mixture.eval()
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, PATCHES] = 60 - changed["input_ids"][:, PATCHES] % 50

    def apart() -> float:
        found = (outputs(mixture, each)[:, :PATCHES] for each in (batch, changed))
        return float((next(found) - next(found)).abs().max())

    assert apart() == 0
    randomize(mixture)
    assert (apart() > 1e-2) is (direction == "text_to_image")


@pytest.mark.parametrize("side", ["left", "right"])
@over_routers
def test_padding_is_not_read(how: str, side: str) -> None:
    mixture, batch = mixture_of(how), llava_batch()
    real = slice(3, None) if side == "left" else slice(None, -3)
    found = outputs(mixture, padded(batch, 3, side))[:, real]
    torch.testing.assert_close(found, outputs(mixture, batch), rtol=0, atol=1e-4)


@pytest.mark.parametrize("arrange", PROMPTS)
@pytest.mark.parametrize(
    "decoding",
    [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2}],
    ids=["greedy", "beams", "sampled"],
)
@over_routers
def test_a_cache_changes_no_token(how: str, decoding: dict[str, Any], arrange: str) -> None:
    mixture, prompt = mixture_of(how), PROMPTS[arrange]()
    decoding = {"do_sample": False, **decoding}
    cached = generate(mixture, prompt, **decoding)
    assert torch.equal(cached, generate(mixture, prompt, use_cache=False, **decoding))
    with mixture.disabled():
        assert not torch.equal(cached, generate(mixture, prompt, **decoding))


@over_routers
def test_a_static_cache_and_a_loop_by_hand_change_no_token(how: str) -> None:
    mixture, prompt = mixture_of(how), ragged_prompts()
    expected = generate(mixture, prompt, do_sample=False)
    static = generate(mixture, prompt, do_sample=False, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, expected)
    inputs, mask, cache, found = dict(prompt), prompt["attention_mask"], None, []
    for _ in range(NEW):
        with torch.no_grad():
            out = mixture(**inputs, past_key_values=cache, use_cache=True, task=TASKS)
        scores = out.logits[:, -1]
        scores[:, [2, IMAGE_TOKEN]] = -torch.inf  # as `generate` above does
        cache, token = out.past_key_values, scores.argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        inputs = {"input_ids": token, "attention_mask": mask}
        found.append(token)
    assert torch.equal(torch.cat(found, dim=1), expected)


def test_a_prompt_in_chunks_is_refused() -> None:
    mixture, prompt = mixture_of("shared"), prompt_of(llava_batch())
    del prompt["pixel_values"]
    prompt["input_ids"] = prompt["input_ids"].masked_fill(prompt["input_ids"] == IMAGE_TOKEN, 7)
    assert generate(mixture, prompt, do_sample=False).shape == (3, NEW)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        generate(mixture, prompt, do_sample=False, prefill_chunk_size=4)


def _pictures(*shape: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(*shape, generator=torch.Generator().manual_seed(5))}


GRID = {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
CLASSES: dict[str, tuple[int, dict[str, Tensor]]] = {
    "llava": (4, _pictures(2, 3, 16, 16)),
    "llava_pixtral": (4, {**_pictures(2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * 2)}),
    "paligemma": (4, _pictures(2, 3, 16, 16)),
    "gemma3": (4, _pictures(2, 3, 16, 16)),
    "idefics3": (1, _pictures(2, 1, 3, 16, 16)),
    "internvl": (1, _pictures(2, 3, 16, 16)),
    "qwen2_5_vl": (4, {**_pictures(32, 3 * 2 * 14 * 14), **GRID}),
    "qwen3_vl": (4, {**_pictures(32, 3 * 2 * 16 * 16), **GRID}),
}
"""How many image tokens a picture becomes, and two pictures."""


@pytest.mark.parametrize("name", CLASSES)
def test_vision_language_classes_generate_alike_with_a_cache_and_without(name: str) -> None:
    patches, pictures = CLASSES[name]
    ids = torch.randint(5, 60, (2, 8), generator=torch.Generator().manual_seed(2))
    ids[0, :patches], ids[1, 2 : 2 + patches] = IMAGE_TOKEN, IMAGE_TOKEN
    kinds = (ids == IMAGE_TOKEN).long()
    named = {"gemma3": "token_type_ids", "qwen2_5_vl": "mm_token_type_ids", "qwen3_vl": "mm_token_type_ids"}
    told = {named[name]: kinds} if name in named else {}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **told, **pictures}
    mixture = attach(build(name), shared=CrossModal())
    randomize(mixture)
    mixture.eval()
    with torch.no_grad():
        added = mixture(**inputs).logits
        with mixture.disabled():
            plain = mixture(**inputs).logits
    assert ((added - plain).abs().amax(dim=(1, 2)) > 1e-2).all()
    fixed = {"min_new_tokens": NEW, "max_new_tokens": NEW, "pad_token_id": 0, "suppress_tokens": [2, IMAGE_TOKEN]}
    written = [mixture.generate(**inputs, use_cache=cached, do_sample=False, **fixed) for cached in (True, False)]
    assert torch.equal(*written)
