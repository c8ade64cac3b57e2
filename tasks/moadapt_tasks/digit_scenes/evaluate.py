"""How well a base lists scenes it has never seen."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from moadapt_tasks.digit_scenes.listing import PLAIN_PROMPT, list_scene_by_form, read_plain_listing
from moadapt_tasks.digit_scenes.listing_parts import read_box
from moadapt_tasks.digit_scenes.scenes import Scene, SceneObject, draw_scene
from moadapt_tasks.metrics.grounding_accuracy import box_iou

_BATCH = 64
_MAX_NEW_TOKENS = 96
_BOX = re.compile(r"\[[^\[\]]*\]")


def listing_exactness(model: PreTrainedModel, processor: Any, split: str, scenes: int, seed: int) -> dict[str, float]:
    """Ask a base for the plain listing of scenes and compare with the truth.

    Args:
        model: The base, in evaluation mode.
        processor: Its processor.
        split: Whose handwriting to use: `train`, `validation` or `test`.
        scenes: How many scenes, at least 1.
        seed: Seed of the scenes.

    Returns:
        Shares of 0 to 1. Of the scenes: `exact` (all right, every box with an IoU of at least 0.5), `names` (all
        digits with their colours right) and `readable`. Of the digits, each against the listed item that overlaps it
        most: `digit` and `color` right, and `iou`, the mean overlap.
    """
    drawn = [draw_scene(split, index, seed) for index in range(scenes)]
    scores = []
    for start in range(0, scenes, _BATCH):
        batch = drawn[start : start + _BATCH]
        texts = write_listings(model, processor, batch, [PLAIN_PROMPT] * len(batch))
        scores += [_score(scene, read_plain_listing(text)) for scene, text in zip(batch, texts, strict=True)]
    return {name: float(np.mean(np.concatenate([score[name] for score in scores]))) for name in scores[0]}


def exactness_by_form(model: PreTrainedModel, processor: Any, split: str, scenes: int, seed: int) -> dict[str, float]:
    """Ask a base for every form of listing that has one right answer.

    Args:
        model: The base, in evaluation mode.
        processor: Its processor.
        split: Whose handwriting to use: `train`, `validation` or `test`.
        scenes: How many scenes, at least 1.
        seed: Seed of the scenes and of the prompts.

    Returns:
        By form, the share of listings with every word right and every box with an IoU of at least 0.5.
    """
    drawn = [draw_scene(split, index, seed) for index in range(scenes)]
    asked = [list_scene_by_form(scene, np.random.default_rng([seed, index])) for index, scene in enumerate(drawn)]
    shares = {}
    for form in asked[0]:
        prompts, answers = zip(*(forms[form] for forms in asked), strict=True)
        written: list[str] = []
        for start in range(0, scenes, _BATCH):
            some = slice(start, start + _BATCH)
            written += write_listings(model, processor, drawn[some], prompts[some])
        shares[form] = float(np.mean([_same(text, answer) for text, answer in zip(written, answers, strict=True)]))
    return shares


def write_listings(
    model: PreTrainedModel, processor: Any, scenes: Sequence[Scene], prompts: Sequence[str]
) -> list[str]:
    """Return what a base writes, greedily, about each scene when asked by its prompt."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        )
        for prompt in prompts
    ]
    images = [Image.fromarray(scene.pixels) for scene in scenes]
    batch = processor(images=images, text=texts, return_tensors="pt", padding=True).to(model.device)
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    generate: Any = model.generate  # typed as a module's Tensor
    with torch.inference_mode():
        written: Tensor = generate(**batch, do_sample=False, max_new_tokens=_MAX_NEW_TOKENS)
    found: list[str] = processor.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def _same(text: str, answer: str) -> bool:
    """Compare two listings word by word, and boxes by overlap."""
    if _BOX.split(text) != _BOX.split(answer):
        return False
    pairs = [[read_box(box) for box in _BOX.findall(each)] for each in (text, answer)]
    return all(found and right and box_iou(found, right) >= 0.5 for found, right in zip(*pairs, strict=True))


def _score(scene: Scene, listed: list[SceneObject] | None) -> dict[str, list[float]]:
    found = listed or []
    named = {thing.name: thing for thing in found}
    names = len(found) == len(scene.objects) and named.keys() == {thing.name for thing in scene.objects}
    boxes = names and all(box_iou(thing.box, named[thing.name].box) >= 0.5 for thing in scene.objects)
    pairs = [(thing, _nearest(thing, found)) for thing in scene.objects]
    return {
        "exact": [float(boxes)],
        "names": [float(names)],
        "readable": [float(listed is not None)],
        "digit": [float(near is not None and near.digit == thing.digit) for thing, near in pairs],
        "color": [float(near is not None and near.color == thing.color) for thing, near in pairs],
        "iou": [box_iou(thing.box, near.box) if near is not None else 0.0 for thing, near in pairs],
    }


def _nearest(thing: SceneObject, found: Sequence[SceneObject]) -> SceneObject | None:
    touching = [other for other in found if box_iou(thing.box, other.box) > 0]
    return max(touching, key=lambda other: box_iou(thing.box, other.box), default=None)
