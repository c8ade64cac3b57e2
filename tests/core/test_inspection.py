"""What a base is made of and what an adapter adds, read off shapes."""

import json

import pytest
import torch

from moadapt import Placement, anatomy, attach
from moadapt.adapters import LoRA
from moadapt.adapters.bottleneck import Bottleneck
from moadapt.adapters.scale import Scale
from moadapt.costs import cost_at
from moadapt.inspection import inspection, unread_names
from tests.core.test_placement import SMALL, llava
from tests.core.zoo import ZOO, build

RANK = 4
SHARES = {"all": 100, "top": 33, "bottom": 17, "sparse": 50, "vision": 33, "language": 67}


def attention(name: str) -> LoRA:
    named = Placement.named(name)
    return LoRA(rank=RANK, placement=Placement(**{**vars(named), "kinds": ("attention",)}))


def test_named_placements_add_their_shares_of_all() -> None:
    base = llava(6, 12)
    added = {name: inspection(base, attention(name)).added for name in SHARES}
    assert {name: round(100 * count / added["all"]) for name, count in added.items()} == SHARES
    assert added["all"] == 18 * 4 * RANK * (32 + 32)


@pytest.mark.parametrize("name", ZOO)
def test_nothing_is_counted_twice_or_left_out(name: str) -> None:
    base = build(name)
    before = {path: id(module) for path, module in base.named_modules()}
    found, parts = inspection(base, LoRA(rank=RANK)), anatomy(base)
    assert sum(tower.parameters for tower in found.towers) == found.parameters == base.num_parameters()
    for total in (found.towers, found.groups):
        assert sum(part.added for part in total) == found.added
    assert sum(count for _, _, count in found.added_by_layer) == found.added
    assert sum(group.sites for group in found.groups) == len(parts.sites) + len(parts.unread)
    assert sum(group.sites for group in found.groups if not group.read) == len(parts.unread)
    assert {path: id(module) for path, module in base.named_modules()} == before
    assert json.loads(json.dumps(found.as_json()))["added"] == found.added


def test_costs_of_lora_are_those_of_its_products() -> None:
    adapter = LoRA(rank=RANK, placement=Placement(depth={"language": (0.0, 1.0)}, modules=("q_proj", "down_proj")))
    found = inspection(llava(6, 12), adapter)
    tower = {tower.name: tower for tower in found.towers}["language"]
    widths = 12 * [(32, 32), (48, 32)]
    assert found.added == tower.added == sum(RANK * (d + f) for d, f in widths)
    assert tower.flops_per_token == sum(2 * RANK * (d + f) for d, f in widths)
    assert tower.saved_per_token == sum(4 * (d + RANK) for d, f in widths)  # inputs and what lies between, in float32
    assert tower.base_flops_per_token == 12 * 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert tower.adapted == tuple(range(12))
    memory = found.memory
    assert (memory.parameters, memory.gradients, memory.optimizer) == (4 * found.added,) * 2 + (8 * found.added,)
    assert memory.merged == 0
    assert inspection(llava(6, 12), Bottleneck()).memory.merged is None


def test_costs_at_embeddings_and_patches_are_for_one_token() -> None:
    mixture = attach(llava(6, 12), shared=LoRA(rank=RANK, placement=Placement(modules=("patch_embedding",))))
    site, bank = next(mixture.banks())
    base = mixture.detach()
    cost = cost_at(site, bank, base.get_submodule(site.path), torch.float32)
    assert cost is not None
    assert cost.flops == 2 * RANK * (3 * 8 * 8 + 32)


def test_rescaling_what_enters_a_layer_costs_no_second_product() -> None:
    language = {tower.name: tower for tower in inspection(llava(6, 12), Scale()).towers}["language"]
    assert language.added > 0
    assert language.flops_per_token == 0


def test_half_precision_halves_what_is_kept() -> None:
    kept = [
        next(tower.saved_per_token for tower in inspection(base, LoRA()).towers if tower.name == "language")
        for base in (llava(6, 12), llava(6, 12).to(torch.bfloat16))
    ]
    assert kept[0] == 2 * (kept[1] or 0)


def test_unread_blocks_and_sites_are_named() -> None:
    assert unread_names(SMALL) == ("model.vision_tower.post_layernorm",)
    parts = anatomy(llava(3, 1, layer=-2))
    assert unread_names(parts) == ("model.vision_tower.encoder.layers.2", "model.vision_tower.post_layernorm")
