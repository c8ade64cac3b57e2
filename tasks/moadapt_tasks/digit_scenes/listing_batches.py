"""What the digit-scene base is trained on: pictures, what their patches show, and listings of what is where."""

import re
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset
from transformers import LlavaProcessor

from moadapt_tasks.digit_scenes.base import PATCH
from moadapt_tasks.digit_scenes.listing import list_scene
from moadapt_tasks.digit_scenes.recipe import PretrainSettings
from moadapt_tasks.digit_scenes.scenes import COLORS, SIZE, Scene

IGNORED = -100
_SIDE = SIZE // PATCH


def patch_targets(scene: Scene) -> NDArray[np.float32]:
    """Say what each patch shows.

    Returns:
        (49, 6): digit (10 where empty), colour index (6 where empty), and the box over the image side, of the object
        that covers most of the patch and at least a quarter of it.
    """
    edges = np.arange(_SIDE) * PATCH
    cover = np.zeros((len(scene.objects), _SIDE, _SIDE))
    for i, thing in enumerate(scene.objects):
        left, top, right, bottom = thing.box
        across = np.minimum(edges + PATCH, right) - np.maximum(edges, left)
        down = np.minimum(edges + PATCH, bottom) - np.maximum(edges, top)
        cover[i] = down.clip(0)[:, None] * across.clip(0)[None, :] / PATCH**2
    rows = [[t.digit, list(COLORS).index(t.color), *(edge / SIZE for edge in t.box)] for t in scene.objects]
    facts = np.array([*rows, [10, len(COLORS), 0, 0, 0, 0]], dtype=np.float32)
    owner = np.where(cover.max(axis=0) >= 0.25, cover.argmax(axis=0), len(scene.objects))
    return facts[owner.ravel()]


def scaled(pixels: NDArray[np.uint8], processor: LlavaProcessor) -> Tensor:
    """Return pixels (B, side, side, 3) as the vision tower reads them, (B, 3, side, side).

    Args:
        pixels: Of pictures that need no resizing.
        processor: Of the base; mean and deviation are the same for all colours.
    """
    scale = processor.image_processor
    values = (pixels.astype(np.float32) / 255 - np.float32(scale.image_mean[0])) / np.float32(scale.image_std[0])
    return torch.from_numpy(values).permute(0, 3, 1, 2).contiguous()


def packed(texts: list[tuple[str, str]], processor: LlavaProcessor, patches: int) -> dict[str, Tensor]:
    """Return prompts and answers behind an image each, padded on the right; labels lie on the answers.

    Args:
        texts: Prompt and answer of every row.
        processor: Of the base.
        patches: How many image tokens a row has.
    """
    tokenizer, image = processor.tokenizer, [processor.image_token_id] * patches
    prompts = tokenizer([prompt + "\n" for prompt, _ in texts]).input_ids
    answers = tokenizer([answer + "<eos>" for _, answer in texts]).input_ids
    rows = [torch.tensor([*image, *p, *a]) for p, a in zip(prompts, answers, strict=True)]
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    labels = torch.full_like(ids, IGNORED)
    for row, (tokens, answer) in enumerate(zip(rows, answers, strict=True)):
        labels[row, len(tokens) - len(answer) : len(tokens)] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long(), "labels": labels}


class ListingBatches(IterableDataset[dict[str, Tensor]]):
    """Endless batches; batch `i` is a pure function of (seed, i).

    Args:
        scenes: Scenes to list.
        processor: Tokenizer and image processor of the base.
        settings: Batch size and seed.
        start: First batch, so that a resumed run sees what the interrupted one would have seen.
    """

    def __init__(self, scenes: list[Scene], processor: LlavaProcessor, settings: PretrainSettings, start: int) -> None:
        self._settings, self._start, self._scenes = settings, start, scenes
        self._processor = processor
        self._targets = np.stack([patch_targets(scene) for scene in scenes])
        texts = {text: index for text, index in processor.tokenizer.get_vocab().items() if text.endswith("[")}
        self._brackets = torch.tensor(sorted(texts.values()))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield batches from `start` on."""
        step = self._start
        while True:
            yield self._batch(step)
            step += 1

    def _batch(self, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self._settings.seed, step])
        chosen = rng.integers(len(self._scenes), size=self._settings.batch_size)
        scenes = [self._scenes[i] for i in chosen]
        lookups = step >= self._settings.patch_steps + self._settings.list_steps
        batch = self._tokens([list_scene(scene, rng, lookups=lookups) for scene in scenes])
        batch["pixel_values"] = scaled(np.stack([scene.pixels for scene in scenes]), self._processor)
        batch["patches"] = torch.from_numpy(self._targets[chosen])
        return batch

    def _tokens(self, texts: list[tuple[str, str]]) -> dict[str, Tensor]:
        batch = packed(texts, self._processor, _SIDE**2)
        boxes = torch.full((*batch["labels"].shape, 4), torch.nan)
        begun = torch.isin(batch["labels"], self._brackets)
        for row, (_, answer) in enumerate(texts):
            listed = _boxes_of(answer)
            if len(listed):  # rows of mere words may hold brackets too
                boxes[row, begun[row]] = listed
        return {**batch, "boxes": boxes}


def _boxes_of(listing: str) -> Tensor:
    """Return the boxes that a text has, over the image side, (boxes, 4)."""
    numbers = [int(number) for box in re.findall(r"\[(\d[^]]*)]", listing) for number in box.split(", ")]
    return torch.tensor(numbers).reshape(-1, 4) / 999
