"""Anatomy and placement on tiny models of many classes."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from moadapt import Placement, anatomy, attach
from moadapt.adapters import LoRA
from moadapt.sites import KINDS, Anatomy, Site
from moadapt.towers import TOWERS
from moadapt_routers import ByTask
from tests.core.zoo import ZOO, build

TEXT_ONLY, VISION_ONLY = ["llama", "qwen3", "gpt2", "bert", "t5"], ["vit", "dinov2"]
BLOCKS: dict[str, dict[str, int]] = {  # blocks of each tower, as the configs say
    "llama": {"language": 2},
    "qwen3": {"language": 2},
    "gpt2": {"language": 2},
    "bert": {"language": 2},
    "t5": {"language": 4},  # of the encoder, then of the decoder
    "vit": {"vision": 3},
    "dinov2": {"vision": 3},
    "llava": {"vision": 3, "language": 2},
    "llava_pixtral": {"vision": 3, "language": 2},
    "llava_next": {"vision": 3, "language": 2},
    "llava_onevision": {"vision": 3, "language": 2},
    "qwen2_5_vl": {"vision": 2, "language": 2},
    "qwen3_vl": {"vision": 3, "language": 2},
    "paligemma": {"vision": 3, "language": 2},
    "gemma3": {"vision": 3, "language": 2},
    "idefics3": {"vision": 3, "language": 2},
    "smolvlm": {"vision": 3, "language": 2},
    "internvl": {"vision": 3, "language": 2},
    "mllama": {"vision": 5, "language": 3},  # local, then global vision blocks
    "blip2": {"vision": 3, "language": 2},
    "florence2": {"vision": 4, "language": 4},  # stages of the vision tower; encoder, then decoder
}
PATHS = {
    "llava": ("model.vision_tower", "model.multi_modal_projector", "model.language_model"),
    "qwen2_5_vl": ("model.visual", "model.visual.merger", "model.language_model"),
    "idefics3": ("model.vision_model", "model.connector", "model.text_model"),
    "mllama": ("model.vision_model", "model.multi_modal_projector", "model.language_model"),
    "blip2": ("vision_model", "qformer", "language_model"),
}
ALL = Placement(towers=TOWERS, kinds=KINDS)


def found(name: str) -> Anatomy:
    return anatomy(build(name))


def paths_of(sites: tuple[Site, ...]) -> set[str]:
    return {site.path for site in sites}


def place(parts: Anatomy, placement: Placement) -> tuple[Site, ...]:
    """Where LoRAs sit."""
    return placement.sites(parts, LoRA())


@pytest.mark.parametrize("name", ZOO)
def test_towers_and_their_depth_are_found(name: str) -> None:
    towers = found(name).towers
    assert {tower.name: len(tower.blocks) for tower in towers if tower.name != "connector"} == BLOCKS[name]
    has_connector = any(tower.name == "connector" for tower in towers)
    assert has_connector is (name not in TEXT_ONLY + VISION_ONLY)


@pytest.mark.parametrize("name", PATHS)
def test_towers_stand_at_their_paths(name: str) -> None:
    base, parts = build(name), anatomy(build(name))
    for tower, path in zip(TOWERS, PATHS[name], strict=True):
        assert parts.tower(tower).path == path
        for block in parts.tower(tower).blocks:
            assert isinstance(base.get_submodule(block), nn.Module)
            assert block.startswith(path + ".")


@pytest.mark.parametrize("name", ZOO)
def test_every_linear_of_a_tower_is_a_site_of_one_tower(name: str) -> None:
    base = build(name)
    parts = anatomy(base)
    kernels = {path for path, module in base.named_modules() if isinstance(module, nn.MultiheadAttention)}
    linears = {
        path: module
        for path, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and path.rpartition(".")[0] not in kernels
    }
    sites = [*parts.of_form("linear"), *(site for site in parts.unread if site.form == "linear")]
    assert len({site.path for site in sites}) == len(sites)
    assert linears.keys() - paths_of(tuple(sites)) <= {"lm_head"}
    assert paths_of(tuple(sites)) <= linears.keys()
    for site in sites:
        weight = linears[site.path].weight
        shape = weight.T.shape if isinstance(linears[site.path], Conv1D) else weight.shape
        assert (site.out_features, site.in_features) == tuple(shape)
        assert parts.tower(site.tower).blocks or site.layer is None
        if site.layer is not None:
            assert site.path.startswith(parts.tower(site.tower).blocks[site.layer] + ".")


@pytest.mark.parametrize("name", ZOO)
def test_sites_in_blocks_are_attention_or_mlp(name: str) -> None:
    parts = found(name)
    for site in parts.of_form("linear"):
        if site.tower == "connector":
            assert site.kind == "projector"
        else:
            assert (site.kind in ("attention", "mlp")) is (site.layer is not None), site
    for tower in parts.towers:
        layers = Counter((site.layer, site.kind) for site in parts.of_form("linear") if site.tower == tower.name)
        for layer in range(tower.num_read):
            assert layers[layer, "attention"] >= 2
            assert layers[layer, "mlp"] >= 2


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        (
            "llama",
            {
                "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
                "mlp": {"gate_proj", "up_proj", "down_proj"},
                "other": {"lm_head"},
            },
        ),
        ("bert", {"attention": {"query", "key", "value", "dense"}, "mlp": {"dense"}, "other": {"dense", "classifier"}}),
        ("t5", {"attention": {"q", "k", "v", "o"}, "mlp": {"wi", "wo"}, "other": {"lm_head"}}),
    ],
)
def test_kinds_are_told_by_the_modules_around(name: str, kinds: dict[str, set[str]]) -> None:
    names: dict[str, set[str]] = {}
    for site in found(name).of_form("linear"):
        names.setdefault(site.kind, set()).add(site.path.rsplit(".", 1)[-1])
    assert names == kinds


@pytest.mark.parametrize(("layer", "read"), [(-1, 3), (-2, 2), (-3, 1), (1, 1), ([-3, -2], 2), ([0, 3], 3)], ids=str)
def test_blocks_behind_the_features_that_are_read_get_no_site(layer: Any, read: int) -> None:
    base = build("llava")
    base.config.vision_feature_layer = layer
    parts = anatomy(base)
    assert parts.tower("vision").num_read == read
    chosen = {site.layer for site in place(parts, Placement(towers=("vision",)))}
    assert chosen == set(range(read))
    assert {site.layer for site in parts.unread} - {None} == set(range(read, 3))


def test_a_tower_that_a_base_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="this base has no 'language' tower; it has vision"):
        found("vit").tower("language")


@pytest.mark.parametrize("name", ZOO)
def test_by_default_adapters_sit_in_the_language_tower(name: str) -> None:
    parts = found(name)
    tower = "vision" if name in VISION_ONLY else "language"
    expected = {s.path for s in parts.of_form("linear") if s.tower == tower and s.kind in ("attention", "mlp")}
    assert expected
    assert paths_of(place(parts, Placement())) == expected


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        *((name, cut) for name in ("llava", "vit") for cut in (1 / 3, 0.4, 0.5)),
        *((name, cut) for name in ("mllama", "florence2") for cut in (0.2, 0.5, 2 / 3, 0.75)),
    ],
)
def test_depths_that_meet_share_no_block_and_leave_none_out(name: str, cut: float) -> None:
    parts = found(name)
    towers = tuple(BLOCKS[name])
    lower, upper = (place(parts, Placement(towers=towers, depth=depth)) for depth in ((0.0, cut), (cut, 1.0)))
    assert paths_of(lower) | paths_of(upper) == paths_of(place(parts, Placement(towers=towers)))
    for tower, count in BLOCKS[name].items():
        low, high = ({s.layer for s in sites if s.tower == tower} for sites in (lower, upper))
        read = set(range(parts.tower(tower).num_read))
        stack = 2 if (name, tower) == ("florence2", "language") else count  # encoder and decoder have two blocks each
        assert low == {layer for layer in read if layer % stack < cut * stack - 1e-9}
        assert high == read - low


@pytest.mark.parametrize(
    ("depth", "layers"),
    [((0, 1), {0, 1, 2}), ((0.5, 1), {2}), ((0, 0.5), {0, 1}), ((1 / 3, 2 / 3), {1}), ((0.34, 0.7), {2})],
    ids=str,
)
def test_a_depth_chooses_blocks_that_begin_in_it(depth: tuple[float, float], layers: set[int]) -> None:
    assert {site.layer for site in place(found("vit"), Placement(depth=depth))} == layers


def test_kinds_choose_sites_in_blocks_and_leave_a_connector_whole() -> None:
    parts = found("llava")
    for kind in ("attention", "mlp"):
        chosen = place(parts, Placement(towers=TOWERS, kinds=(kind,)))
        assert {site.kind for site in chosen} == {kind, "projector"}
    assert {s.tower for s in place(parts, Placement(towers=TOWERS, kinds=("projector",)))} == {"connector"}
    assert {s.path for s in place(found("llama"), Placement(kinds=("other",)))} == {"lm_head"}


def test_a_depth_leaves_sites_outside_the_blocks() -> None:
    lower = place(found("llava"), Placement(towers=("connector", "language"), depth=(0, 0.5)))
    assert {site.layer for site in lower} == {None, 0}


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (("down_proj",), {f"model.language_model.layers.{i}.mlp.down_proj" for i in range(2)}),
        (("self_attn.o_proj",), {f"model.language_model.layers.{i}.self_attn.o_proj" for i in range(2)}),
        (("linear_2",), {"model.multi_modal_projector.linear_2"}),
        (("encoder.layers.1.mlp.fc1",), {"model.vision_tower.encoder.layers.1.mlp.fc1"}),
        (("layers.1.mlp.up_proj",), {"model.language_model.layers.1.mlp.up_proj"}),
        (
            ("model.language_model.layers.0.mlp.up_proj", "1.mlp.down_proj"),
            {"model.language_model.layers.0.mlp.up_proj", "model.language_model.layers.1.mlp.down_proj"},
        ),
    ],
)
def test_modules_are_named_by_whole_parts_of_their_path(modules: tuple[str, ...], expected: set[str]) -> None:
    assert paths_of(place(found("llava"), Placement(modules=modules))) == expected


def test_modules_are_looked_for_in_the_chosen_towers() -> None:
    parts = found("llava")
    chosen = place(parts, Placement(towers=("vision",), modules=("q_proj",), kinds=("mlp",)))  # a name says the kind
    assert paths_of(chosen) == {f"model.vision_tower.encoder.layers.{i}.self_attn.q_proj" for i in range(2)}
    both = place(parts, Placement(towers=("vision", "language"), modules=("q_proj",)))
    assert Counter(site.tower for site in both) == {"vision": 2, "language": 2}


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement(modules=("qproj",)), "near names: q_proj"),
        (Placement(modules=("proj",)), r"towers: connector \(0 blocks\), vision \(3 blocks\), language \(2 blocks\)"),
        (Placement(modules=("_proj",)), "matches no site of this base"),
        (Placement(kinds=()), "kinds is empty; "),
        (
            Placement(kinds=("norm",)),
            "sites of kind 'norm' have the form norm, but LoRA sits at sites of the form linear",
        ),
        (
            Placement(depth=(0.6, 0.65)),
            r"Placement\(depth=\(0\.6, 0\.65\)\) matches no .*; no block begins at depth",
        ),
        (Placement(kinds=()), "modules: down_proj, embed_tokens, fc1, fc2, gate_proj, k_proj, linear_1, linear_2"),
        (Placement(depth=(0.6, 0.9)), "matches no site of this base"),
        (Placement(towers=("vision",), depth=(0.6, 1)), "matches no site of this base"),  # never read
    ],
    ids=str,
)
def test_a_placement_without_a_site_is_refused_with_what_there_is(placement: Placement, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place(found("llava"), placement)


@pytest.mark.parametrize(("name", "tower"), [("llama", "vision"), ("vit", "language"), ("gemma3", "connector")])
def test_a_tower_without_a_site_is_refused(name: str, tower: str) -> None:
    with pytest.raises(ValueError, match=rf"towers=\('{tower}',\).* matches no site of this base"):
        place(found(name), Placement(towers=(tower,)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"towers": ("eyes", "language", "ears")}, "placement names eyes, ears; choose from vision, connector, lang"),
        ({"kinds": ("heads",)}, "placement names heads; choose from attention, mlp, projector, experts"),
        ({"depth": (0.5, 0.5)}, r"placement depth is \(0.5, 0.5\); give two fractions with 0 <= first < last <= 1"),
        ({"depth": (0.9, 0.1)}, "give two fractions"),
        ({"depth": (-0.1, 1)}, "give two fractions"),
        ({"depth": (0, 3)}, "give two fractions"),
        ({"depth": (0, float("nan"))}, "give two fractions"),
    ],
    ids=str,
)
def test_a_placement_of_unknown_parts_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(**given)


@pytest.mark.parametrize("name", ZOO)
def test_every_site_can_carry_an_adapter_and_gives_the_base_back(name: str) -> None:
    base = build(name)
    modules = {path: id(module) for path, module in base.named_modules()}
    mixture = attach(base, shared=LoRA(rank=1), placement=ALL)
    assert {site.path for site, _ in mixture.banks()} == paths_of(mixture.anatomy.of_form(*LoRA.forms))
    assert {path: id(module) for path, module in mixture.detach().named_modules()} == modules


def test_a_linear_that_a_kernel_reads_past_is_no_site() -> None:
    base = build("llava_onevision")
    kernels = [path for path, module in base.named_modules() if isinstance(module, nn.MultiheadAttention)]
    assert kernels
    assert not {f"{path}.out_proj" for path in kernels} & paths_of(anatomy(base).of_form("linear"))


def test_linears_that_are_stored_the_other_way_round_are_sites() -> None:
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=67, n_positions=64)).eval()
    sites = {site.path: site for site in place(anatomy(base), Placement())}
    assert {(path.rsplit(".", 2)[-2], sites[path].kind) for path in sites} == {("attn", "attention"), ("mlp", "mlp")}
    fused = sites["transformer.h.0.attn.c_attn"]
    assert (fused.in_features, fused.out_features) == (32, 96)
    mixture = attach(base, experts={"a": LoRA(), "b": LoRA()}, router=ByTask())
    for _, parameter in mixture.named_adapter_parameters():
        nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = mixture(input_ids=ids, task="b").logits
        merged, _ = mixture.merge("task", task="b")
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
