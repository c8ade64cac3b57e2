"""Strides, depths by tower, named placements, presets, and what is said about a placement that was not meant."""

import re
from typing import Any

import pytest
import torch
from transformers import AlbertConfig, AlbertModel, LlavaForConditionalGeneration, PreTrainedModel

from moadapt import Placement, anatomy
from moadapt.adapters import LoRA
from moadapt.placement import NAMED
from moadapt.presets import PRESETS, preset
from moadapt.sites import Anatomy, Site
from tests.core.zoo import TEXT, VISION, build, config


def llava(vision: int, language: int, layer: int = -1) -> PreTrainedModel:
    """A LLaVA on the meta device with equally wide blocks in both towers."""
    made = config(
        "llava",
        vision_config=config("clip_vision_model", **{**VISION, "hidden_size": 32, "num_hidden_layers": vision}),
        text_config=config("llama", **{**TEXT, "num_key_value_heads": 4, "num_hidden_layers": language}),
        image_token_id=3,
        vision_feature_layer=layer,
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(made)


def layers(sites: tuple[Site, ...]) -> dict[str, list[int]]:
    found: dict[str, set[int]] = {}
    for site in sites:
        if site.layer is not None:
            found.setdefault(site.tower, set()).add(site.layer)
    return {tower: sorted(blocks) for tower, blocks in found.items()}


SMALL, LARGE = anatomy(llava(6, 12)), anatomy(llava(24, 32, layer=-2))


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        (Placement(every=5), {"language": [0, 5, 10]}),
        (Placement(every=2, depth=(0.25, 1.0)), {"language": [3, 5, 7, 9, 11]}),
        (Placement(every=40), {"language": [0]}),
        (Placement(depth={"vision": (0.5, 1.0)}), {"vision": [3, 4, 5]}),
        (Placement(depth={"vision": (0, 0.2), "language": (0.9, 1)}, every=2), {"vision": [0], "language": [11]}),
        (Placement(towers=("vision", "language"), depth={"language": (0, 0.1)}),
         {"vision": [0, 1, 2, 3, 4, 5], "language": [0, 1]}),
    ],
    ids=str,
)  # fmt: skip
def test_strides_start_at_the_interval_and_depths_are_told_by_tower(placement: Placement, expected: Any) -> None:
    assert layers(placement.sites(SMALL, LoRA())) == expected


def test_encoder_and_decoder_have_depths_of_their_own() -> None:
    parts = anatomy(build("t5"))
    assert parts.tower("language").stacks == (2, 2)
    for depth, expected in (((0.0, 0.5), [0, 2]), ((0.5, 1.0), [1, 3])):
        assert layers(Placement(depth=depth).sites(parts, LoRA())) == {"language": expected}


def test_named_placements_have_the_shares_of_equally_wide_blocks() -> None:
    def count(name: str) -> int:
        placement = Placement(**{**vars(Placement.named(name)), "kinds": ("attention",)})
        return sum(site.in_features + site.out_features for site in placement.sites(SMALL, LoRA()))

    shares = {name: round(100 * count(name) / count("all")) for name in NAMED}
    assert shares == {"all": 100, "top": 33, "bottom": 17, "sparse": 50, "vision": 33, "language": 67}


@pytest.mark.parametrize(
    ("task", "rank", "small", "large"),
    [
        ("vqa", 24, ([0, 2, 4], [0, 2, 4, 6, 8, 10]), (list(range(0, 23, 2)), list(range(0, 32, 2)))),
        ("captioning", 16, ([4, 5], list(range(12))), (list(range(16, 23)), list(range(32)))),
        ("grounding", 32, (list(range(6)), [10, 11]), (list(range(23)), list(range(27, 32)))),
    ],
)  # fmt: skip
def test_presets_scale_with_depth(task: str, rank: int, small: list[list[int]], large: list[list[int]]) -> None:
    adapter = preset(task)
    assert (adapter.rank, adapter.alpha) == (rank, 2 * rank)
    assert adapter.placement is not None
    for parts, (vision, language) in ((SMALL, small), (LARGE, large)):
        assert layers(adapter.placement.sites(parts, adapter)) == {"vision": vision, "language": language}


@pytest.mark.parametrize("find", [preset, Placement.named])
def test_an_unknown_name_is_refused_with_the_known_ones(find: Any) -> None:
    known = PRESETS if find is preset else tuple(NAMED)
    with pytest.raises(ValueError, match=rf"is called 'ocr'; there are {', '.join(known)}"):
        find("ocr")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"every": 0}, "every 0-th block; give 1 or more"),
        ({"depth": {"eyes": (0, 1)}}, "placement names eyes; choose from vision, connector, language"),
        ({"towers": ("vision",), "depth": {"language": (0, 1)}}, "placement names language; choose from vision"),
        ({"depth": {"vision": (0.5, 0.2)}}, "placement depth is"),
        ({"depth": (0.5,)}, "placement depth is"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_placement_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(**given)


def test_a_module_that_both_towers_have_must_say_which_is_meant() -> None:
    message = (
        "module 'q_proj' is found in the language tower (12 times) and the vision tower (6 times); write "
        'towers=("language",) or ("vision",), ("language", "vision") for all of them, or whole paths'
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        Placement(modules=("o_proj", "q_proj")).sites(SMALL, LoRA())
    path = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    assert [site.path for site in Placement(modules=(path,)).sites(SMALL, LoRA())] == [path]
    chosen = Placement(modules=("q_proj",), depth={"vision": (0.0, 0.5)}).sites(SMALL, LoRA())
    assert layers(chosen) == {"vision": [0, 1, 2]}


class Norms(LoRA):
    forms = ("norm",)


class Convolutions(LoRA):
    forms = ("conv2d",)


@pytest.mark.parametrize(
    ("name", "family", "message"),
    [
        ("*.q_proj", LoRA(), r"'\*.q_proj' is compared as it stands, \* and other patterns mean nothing in it"),
        ("self_attn", LoRA(), "'self_attn' is a container; name what it holds: k_proj, o_proj, q_proj, v_proj"),
        ("layers.1.mlp", LoRA(), "'layers.1.mlp' is a container; name what it holds: down_proj, gate_proj, up_proj"),
        ("input_layernorm", LoRA(), "'input_layernorm' has the form norm, but LoRA sits at sites of the form linear"),
        ("input_layernrom", Norms(), "near names: input_layernorm"),
        ("q_proj", Convolutions(), "this base has only sites of the forms embedding, entry, linear, norm, sublayer"),
    ],
)  # fmt: skip
def test_a_name_that_matches_nothing_is_explained(name: str, family: LoRA, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(modules=(name,)).sites(anatomy(build("llama")), family)


def test_a_name_elsewhere_is_told() -> None:
    with pytest.raises(ValueError, match="'fc1' exists, but not in these towers or at this depth"):
        Placement(towers=("language",), modules=("fc1",)).sites(SMALL, LoRA())
    with pytest.raises(ValueError, match=r"layers.23.mlp.fc1' is never read by this base, and skipped unless unread"):
        Placement(modules=("encoder.layers.23.mlp.fc1",)).sites(LARGE, LoRA())
    with pytest.raises(ValueError, match="never read, and skipped unless unread=True: vision block 23"):
        Placement(depth={"vision": (0.95, 1.0)}).sites(LARGE, LoRA())


def test_unread_sites_are_chosen_on_demand() -> None:
    def chosen(parts: Anatomy, **fields: Any) -> dict[str, list[int]]:
        return layers(Placement(towers=("vision",), depth=(0.9, 1.0), **fields).sites(parts, LoRA()))

    assert chosen(LARGE) == {"vision": [22]}
    assert chosen(LARGE, unread=True) == {"vision": [22, 23]}


def test_the_second_layer_of_alberts_mlp_is_mlp() -> None:
    shape = {"embedding_size": 8, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    parts = anatomy(AlbertModel(AlbertConfig(vocab_size=67, **shape)))
    kinds = {site.path.rsplit(".", 1)[-1]: site.kind for site in parts.of_form("linear") if site.layer is not None}
    assert kinds["ffn"] == kinds["ffn_output"] == "mlp"
