from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaProcessor, PreTrainedModel

from moadapt_tasks.digit_scenes.base import build_model, build_processor, build_tokenizer
from moadapt_tasks.digit_scenes.evaluate import list_scenes, listing_exactness
from moadapt_tasks.digit_scenes.listing import PLAIN_PROMPT, plain_listing
from moadapt_tasks.digit_scenes.scenes import Scene, SceneObject, draw_scene

SCENES = 70  # more than one batch


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


def test_list_scenes_asks_the_model_as_pretraining_did(scenes: list[Scene], processor: LlavaProcessor) -> None:
    asked: list[Tensor] = []

    def generate(input_ids: Tensor, **_: Any) -> Tensor:
        asked.append(input_ids)
        return input_ids

    model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, generate=generate)
    list_scenes(cast(PreTrainedModel, model), processor, [Image.fromarray(scene.pixels) for scene in scenes[:2]])
    expected = [processor.image_token_id] * 49 + processor.tokenizer(PLAIN_PROMPT + "\n").input_ids
    assert asked[0].tolist() == [expected, expected]


def test_list_scenes_works_with_the_base(scenes: list[Scene], processor: LlavaProcessor) -> None:
    model: Any = build_model(processor.tokenizer)
    model = model.half().eval()
    texts = list_scenes(model, processor, [Image.fromarray(scene.pixels) for scene in scenes[:2]])
    assert [type(text) for text in texts] == [str, str]


def test_listing_exactness_counts_an_item_listed_twice(scenes: list[Scene], processor: LlavaProcessor) -> None:
    texts = [f"{listing}; {listing.split('; ')[0]}" for listing in map(plain_listing, scenes)]
    scores = exactness(texts, processor)
    assert (scores["exact"], scores["names"], scores["readable"], scores["digit"]) == (0, 0, 1, 1)
