from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moadapt.bases import load_base
from moadapt_tasks.digit_scenes import pretrain as recipe
from moadapt_tasks.digit_scenes.base import build_model, build_processor, build_tokenizer
from moadapt_tasks.digit_scenes.evaluate import write_listings
from moadapt_tasks.digit_scenes.listing import PLAIN_PROMPT, list_scene
from moadapt_tasks.digit_scenes.listing_batches import ListingBatches, patch_targets
from moadapt_tasks.digit_scenes.recipe import PretrainSettings
from moadapt_tasks.digit_scenes.scenes import SIZE, Scene, SceneObject, draw_scene

SETTINGS = PretrainSettings(patch_steps=2, list_steps=1, lookup_steps=2, batch_size=6, scenes=8)


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    scenes = [draw_scene("train", index, 3) for index in range(40)]
    rng = np.random.default_rng(0)
    processor = build_processor(build_tokenizer(" ".join(list_scene(scene, rng)) for scene in scenes))
    made = ListingBatches(scenes, processor, PretrainSettings(patch_steps=0, list_steps=0, batch_size=40), 0)
    return [batch for batch, _ in zip(made, range(3), strict=False)]


def test_boxes_stand_where_their_brackets_open(batches: list[dict[str, torch.Tensor]]) -> None:
    known = 0
    for batch in batches:
        begun = ~batch["boxes"].isnan().any(dim=-1)
        assert not (begun & (batch["labels"] == -100)).any()
        boxes = batch["boxes"][begun]
        assert (boxes[:, :2] < boxes[:, 2:]).all()
        assert ((boxes >= 0) & (boxes <= 1)).all()
        known += len(boxes)
    assert known > 60


def test_patches_say_what_they_show() -> None:
    pixels = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    targets = patch_targets(
        Scene(pixels, (SceneObject(3, "green", (8, 0, 24, 16)), SceneObject(5, "red", (40, 40, 56, 56))))
    )
    grid = targets.reshape(7, 7, 6)
    assert (grid[:2, 1:3, 0] == 3).all()
    assert (grid[:2, 1:3, 1] == 1).all()
    np.testing.assert_allclose(grid[0, 1, 2:], np.array([8, 0, 24, 16]) / SIZE, rtol=1e-6)
    assert (targets[:, 0] == 10).sum() == 49 - 4 - 4


def test_the_recipe_runs_from_start_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool]] = []
    step = recipe.ListingModule.training_step

    def noting(module: Any, batch: Any, index: int) -> None:
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        step(module, batch, index)
        moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
        seen.append((module.global_step, any("language_model" in name for name in moved)))
        assert any("vision_tower" in name for name in moved)

    monkeypatch.setattr(recipe.ListingModule, "training_step", noting)
    recipe.pretrain(tmp_path / "base", SETTINGS, tmp_path / "work")
    assert seen == [(1, False), (2, False), (3, True), (4, True), (5, True)]
    model, processor = load_base(str(tmp_path / "base"), dtype="float32")
    assert len(write_listings(model, processor, [draw_scene("test", 0)], [PLAIN_PROMPT])) == 1
    with pytest.raises(ValueError, match=r"work holds checkpoints of .*'seed': 0.*seed=1.*; give another folder"):
        recipe.pretrain(tmp_path / "base", replace(SETTINGS, seed=1), tmp_path / "work")


def test_every_phase_warms_up_and_cools_down() -> None:
    settings = PretrainSettings(patch_steps=1000, list_steps=1500, lookup_steps=2000)
    processor = build_processor(build_tokenizer(["list"]))
    module = recipe.ListingModule(build_model(processor.tokenizer), settings)
    rates = [module._rate(step) for step in range(settings.steps + 1)]
    for phase in (rates[:1000], rates[1000:2500], rates[2500:]):
        assert 0.9 < max(phase) <= 1
    for end in (999, 2499, 4499):
        assert rates[end] < 0.03
    for start in (0, 1000, 2500):
        assert rates[start] < 0.01


def test_prompts_of_the_first_listings_name_nothing() -> None:
    rng = np.random.default_rng(0)
    scenes = [draw_scene("train", index, 3) for index in range(200)]
    prompts = [list_scene(scene, rng, lookups=False)[0] for scene in scenes]
    prompts = [prompt for prompt in prompts if not prompt.startswith("list words")]
    assert not [p for p in prompts if any(word.isdigit() or word in ("red", "green", "white") for word in p.split())]
