"""Anatomy and placement on tiny models of many classes, and law 9: rows find their images, or are refused."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from moadapt import Placement, RouterSpec, anatomy, attach
from moadapt.adapters import LoRA
from moadapt.sites import KINDS, Anatomy, Site
from moadapt.towers import TOWERS
from moadapt_routers import ByTask, Constant, Softmax, TopK
from tests.conformance.canonical import EVERYWHERE, label, make, router_specs
from tests.core.zoo import ZOO, build
from tests.models import IMAGE_TOKEN, llava_batch, prompt_of, rows_of, uneven_images

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


def batch_of(name: str) -> dict[str, Tensor]:
    """Two rows for a base of the zoo, one image each; the rows have different tokens and pixels."""
    patches = {"qwen2_5_vl": 1, "internvl": 1, "idefics3": 1, "smolvlm": 1}.get(name, 4)
    text = torch.randint(5, 60, (2, 3))
    ids = torch.cat([torch.full((2, patches), IMAGE_TOKEN), text], dim=1)
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    if name in ("idefics3", "smolvlm"):
        batch["pixel_values"] = batch["pixel_values"].unsqueeze(1)
    if name in ("paligemma", "gemma3"):
        batch["token_type_ids"] = (ids == IMAGE_TOKEN).long()
    if name == "qwen2_5_vl":
        batch["pixel_values"] = torch.randn(8, 3 * 2 * 14 * 14)
        batch["image_grid_thw"] = torch.tensor([[1, 2, 2]] * 2)
        batch["mm_token_type_ids"] = (ids == IMAGE_TOKEN).long()
    return batch


SIMPLE = ["llava", "paligemma", "gemma3", "idefics3", "smolvlm", "internvl"]
"""Bases whose towers keep one row an image."""


@pytest.mark.parametrize("name", SIMPLE)
def test_a_row_steers_its_own_image_and_no_other(name: str) -> None:
    base, batch = build(name), batch_of(name)
    two = {"a": LoRA(), "b": LoRA()}
    mixture = attach(base, experts=two, router=ByTask(), placement=Placement(towers=("vision", "connector")))
    for parameter in mixture.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)  # so that pixels matter
    mixture.eval()
    with torch.no_grad():
        mixed = mixture(**batch, task=["a", "b"]).logits
        alone = {task: mixture(**batch, task=task).logits for task in two}
    torch.testing.assert_close(mixed[0], alone["a"][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], alone["b"][1], rtol=1e-4, atol=1e-4)
    for row, other in ((0, "b"), (1, "a")):
        assert (mixed[row] - alone[other][row]).abs().max() > 1e-2


def steered(router: RouterSpec) -> bool:
    """Whether rows of a tower before the language tower may get different weights."""
    return router.depends_on != "nothing" and (router.scope, router.per, router.depends_on) != (
        "token", "model", "input"
    )  # fmt: skip


@pytest.mark.parametrize("router", [r for r in router_specs(scope="sequence") if steered(r)], ids=label)
def test_images_that_match_no_rows_are_refused(router: RouterSpec) -> None:
    mixture, prompt = make(router, EVERYWHERE), prompt_of(llava_batch())
    two_images = rows_of(prompt, 0, 1)
    two_images["input_ids"] = torch.cat([two_images["input_ids"][:, :4], two_images["input_ids"]], dim=1)
    two_images["attention_mask"] = torch.ones_like(two_images["input_ids"])
    two_images["pixel_values"] = torch.randn(4, 3, 16, 16)
    for batch, tasks in ((uneven_images(prompt), ["ask", "tell", "find"]), (two_images, ["ask", "tell"])):
        with pytest.raises(ValueError, match=r"images and rows do not match one to one|one image a row"):
            mixture(**batch, task=tasks)
        assert mixture.context.call is None


@pytest.mark.parametrize("router", [Constant(), None], ids=str)
def test_images_that_match_no_rows_are_fine_where_no_row_is_steered(router: RouterSpec | None) -> None:
    assert make(router, EVERYWHERE)(**uneven_images(prompt_of(llava_batch()))).logits.isfinite().all()


@pytest.mark.parametrize("router", [ByTask(), Softmax(), TopK(per="model")], ids=str)
def test_images_that_match_no_rows_are_fine_for_the_language_tower(router: RouterSpec) -> None:
    batch = uneven_images(prompt_of(llava_batch()))
    assert make(router, Placement())(**batch, task=["ask", "tell", "find"]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (ByTask(), "is routed by row, but images and rows do not match one to one"),
        (Softmax(per="model"), "needs input_ids and one image a row"),
        (Softmax(per="layer"), r"router at vision\.0 would read input of shape \(8, 32\), which has no axis of rows"),
        (Softmax(per="tower"), r"router at vision would read input of shape \(8, 32\), which has no axis of rows"),
        (TopK(scope="token", per="site"), r"would read input of shape \(8, 32\), which has no axis of rows"),
    ],
    ids=str,
)
def test_patches_that_are_packed_without_rows_are_refused(router: RouterSpec, message: str) -> None:
    experts = {"a": LoRA(), "b": LoRA()}
    mixture = attach(build("qwen2_5_vl"), experts=experts, router=router, placement=Placement(towers=("vision",)))
    with pytest.raises(ValueError, match=message):
        mixture(**batch_of("qwen2_5_vl"), task=["a", "b"])
    assert mixture.context.call is None


def test_packed_patches_are_fine_with_constant_weights_or_in_the_language_tower() -> None:
    experts, batch = {"a": LoRA(), "b": LoRA()}, batch_of("qwen2_5_vl")
    for router, tower in ((Constant(), "vision"), (Softmax(), "language"), (ByTask(), "language")):
        placement = Placement(towers=(tower,))
        mixture = attach(build("qwen2_5_vl"), experts=experts, router=router, placement=placement)
        assert mixture(**batch, task=["a", "b"]).logits.isfinite().all()


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


@pytest.mark.parametrize("per", ["model", "tower", "layer", "site"])
def test_images_that_are_packed_into_one_row_are_not_pooled_over_rows(per: Any) -> None:
    batch = batch_of("llava_pixtral") | {"image_sizes": torch.tensor([[16, 16]] * 2)}
    placement = Placement(towers=("vision",))
    two = {"a": LoRA(), "b": LoRA()}
    mixture = attach(build("llava_pixtral"), experts=two, router=Softmax(per=per), placement=placement)
    with pytest.raises(ValueError, match=r"would read input of shape \(1, 8, 24\), whose first axis is not the 2 rows"):
        mixture(**batch)
    assert mixture.context.call is None
    assert mixture(**rows_of(batch, 0)).logits.isfinite().all()
