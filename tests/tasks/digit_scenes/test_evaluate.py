import re
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlavaProcessor, PreTrainedModel

from moadapt_tasks.digit_scenes.base import build_model, build_processor, build_tokenizer
from moadapt_tasks.digit_scenes.evaluate import exactness_by_form, listing_exactness, write_listings
from moadapt_tasks.digit_scenes.listing import PLAIN_PROMPT, list_scene_by_form, plain_listing
from moadapt_tasks.digit_scenes.scenes import Scene, SceneObject, draw_scene

SCENES = 70  # more than one batch
BOX = re.compile(r"\[[^]]*]")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene("validation", index, 4) for index in range(SCENES)]


@pytest.fixture(scope="module")
def processor(scenes: list[Scene]) -> LlavaProcessor:
    return build_processor(build_tokenizer([plain_listing(scene) for scene in scenes] + [PLAIN_PROMPT]))


class Reciter:
    """Stands for a model that writes given texts, in order."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, texts: list[str], tokenizer: Any) -> None:
        self._texts, self._tokenizer = list(texts), tokenizer

    def generate(self, input_ids: Tensor, pixel_values: Tensor, **_: Any) -> Tensor:
        rows = len(input_ids)
        assert pixel_values.shape == (rows, 3, 56, 56)
        written, self._texts = self._texts[:rows], self._texts[rows:]
        answers = self._tokenizer(written, padding=True, padding_side="right", return_tensors="pt").input_ids
        return torch.cat([input_ids, answers], dim=1)


def exactness(texts: list[str], processor: LlavaProcessor) -> dict[str, float]:
    model = cast(PreTrainedModel, Reciter(texts, processor.tokenizer))
    return listing_exactness(model, processor, "validation", SCENES, seed=4)


def changed(scene: Scene, **change: Any) -> str:
    """List a scene with its first digit changed."""
    first = scene.objects[0]
    values: dict[str, Any] = {"digit": first.digit, "color": first.color, "box": first.box} | change
    return plain_listing(Scene(scene.pixels, (SceneObject(**values), *scene.objects[1:])))


def test_listing_exactness_of_the_truth_is_one(scenes: list[Scene], processor: LlavaProcessor) -> None:
    scores = exactness([plain_listing(scene) for scene in scenes], processor)
    assert scores.pop("iou") > 0.98
    assert scores == {"exact": 1, "names": 1, "readable": 1, "digit": 1, "color": 1}


def test_listing_exactness_takes_items_in_any_order(scenes: list[Scene], processor: LlavaProcessor) -> None:
    texts = ["; ".join(reversed(plain_listing(scene).split("; "))) for scene in scenes]
    assert exactness(texts, processor)["exact"] == 1


def test_listing_exactness_of_nonsense_is_zero(processor: LlavaProcessor) -> None:
    assert set(exactness(["red red red"] * SCENES, processor).values()) == {0}


def test_listing_exactness_counts_a_wrong_digit(scenes: list[Scene], processor: LlavaProcessor) -> None:
    texts = [changed(scenes[0], digit=(scenes[0].objects[0].digit + 1) % 10)]
    scores = exactness(texts + [plain_listing(scene) for scene in scenes[1:]], processor)
    digits = sum(len(scene.objects) for scene in scenes)
    assert scores["exact"] == scores["names"] == pytest.approx(1 - 1 / SCENES)
    assert scores["digit"] == pytest.approx(1 - 1 / digits)
    assert (scores["readable"], scores["color"]) == (1, 1)


def test_listing_exactness_counts_a_box_that_is_elsewhere(scenes: list[Scene], processor: LlavaProcessor) -> None:
    left, top, right, _ = scenes[0].objects[0].box
    texts = [changed(scenes[0], box=(left, top, right, top + 3))]
    scores = exactness(texts + [plain_listing(scene) for scene in scenes[1:]], processor)
    assert scores["exact"] == pytest.approx(1 - 1 / SCENES)
    assert (scores["names"], scores["digit"]) == (1, 1)


def test_listing_exactness_counts_a_missing_item(scenes: list[Scene], processor: LlavaProcessor) -> None:
    texts = [plain_listing(scene).rpartition("; ")[0] for scene in scenes]
    scores = exactness(texts, processor)
    digits = sum(len(scene.objects) for scene in scenes)
    assert (scores["exact"], scores["names"], scores["readable"]) == (0, 0, 1)
    assert scores["digit"] == pytest.approx(1 - SCENES / digits)


def test_a_base_is_asked_as_pretraining_did(scenes: list[Scene], processor: LlavaProcessor) -> None:
    asked: list[Tensor] = []

    def generate(input_ids: Tensor, **_: Any) -> Tensor:
        asked.append(input_ids)
        return input_ids

    model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, generate=generate)
    write_listings(cast(PreTrainedModel, model), processor, scenes[:2], [PLAIN_PROMPT, "list box"])
    long, short = (processor.tokenizer(text + "\n").input_ids for text in (PLAIN_PROMPT, "list box"))
    image, pad = [processor.image_token_id] * 49, [processor.tokenizer.pad_token_id] * (len(long) - len(short))
    assert asked[0].tolist() == [image + long, pad + image + short]


def test_a_base_writes_text(scenes: list[Scene], processor: LlavaProcessor) -> None:
    model: Any = build_model(processor.tokenizer)
    texts = write_listings(model.half().eval(), processor, scenes[:2], [PLAIN_PROMPT, "list box"])
    assert [type(text) for text in texts] == [str, str]


def test_exactness_by_form_judges_every_form(scenes: list[Scene], processor: LlavaProcessor) -> None:
    asked = [list_scene_by_form(scene, np.random.default_rng([4, index])) for index, scene in enumerate(scenes)]
    for spoil, expected in ((None, 1), ("[0, 0, 1, 1]", 0)):
        texts = [BOX.sub(spoil, forms[form][1]) if spoil else forms[form][1] for form in asked[0] for forms in asked]
        model = cast(PreTrainedModel, Reciter(texts, processor.tokenizer))
        shares = exactness_by_form(model, processor, "validation", SCENES, seed=4)
        assert list(shares) == list(asked[0])
        for form, share in shares.items():
            with_boxes = sum(bool(BOX.search(forms[form][1])) for forms in asked) / SCENES
            assert share == pytest.approx(1 if expected else 1 - with_boxes), form


def test_listing_exactness_counts_an_item_listed_twice(scenes: list[Scene], processor: LlavaProcessor) -> None:
    texts = [f"{listing}; {listing.split('; ')[0]}" for listing in map(plain_listing, scenes)]
    scores = exactness(texts, processor)
    assert (scores["exact"], scores["names"], scores["readable"], scores["digit"]) == (0, 0, 1, 1)
