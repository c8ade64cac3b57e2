"""Sites called unread are exactly those whose parameters get no gradient."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from moadapt import anatomy
from moadapt.sites import Anatomy
from tests.core.zoo import batch_of, build


def untouched(base: PreTrainedModel, parts: Anatomy, tower: str) -> set[str]:
    """Sites of a tower no parameter of which has a gradient."""
    sites = [site for site in (*parts.sites, *parts.unread) if site.tower == tower]
    return {s.path for s in sites if all(p.grad is None for p in base.get_submodule(s.path).parameters())}


@pytest.mark.parametrize("name", ["llava", "llava_pixtral", "paligemma", "gemma3", "idefics3", "internvl", "blip2"])
def test_unread_sites_get_no_gradient_and_all_others_do(name: str) -> None:
    base = build(name)
    parts = anatomy(base)
    base(**batch_of(name)).logits.sum().backward()
    unread = {site.path for site in parts.unread}
    assert untouched(base, parts, "vision") | untouched(base, parts, "language") == unread
    assert bool(unread) is (name == "llava")


@pytest.mark.parametrize("layer", [-1, -2, [0, 2], [1, 3]], ids=str)
@pytest.mark.parametrize("name", ["llava", "llava_onevision"])
def test_what_lies_behind_the_chosen_features_is_unread(name: str, layer: Any) -> None:
    base = build(name)
    base.config.vision_feature_layer = layer
    vision = base.get_submodule("model.vision_tower")
    states = vision(torch.randn(2, 3, 16, 16), output_hidden_states=True).hidden_states
    sum(states[each].sum() for each in ([layer] if isinstance(layer, int) else layer)).backward()
    parts = anatomy(base)
    unread = {site.path for site in parts.unread}
    assert untouched(base, parts, "vision") == unread
    head = {"llava": "post_layernorm", "llava_onevision": "head.mlp.fc1"}[name]
    assert f"model.vision_tower.{head}" in unread
