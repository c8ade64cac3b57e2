"""Parameters by closed forms: the published figures of a 7B base, and every family at every site it takes."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedModel

from moadapt import Placement, anatomy, attach
from moadapt.adapters import FamilySpec, LoRA
from moadapt.adapters.bias import Bias
from moadapt.registry import FAMILIES
from moadapt.sites import KINDS, Site
from moadapt.towers import TOWERS
from tests.core.zoo import build
from tests.models import llava_7b

BOTH = ("vision", "language")
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module")
def base_7b() -> PreTrainedModel:
    return llava_7b()


def added(base: PreTrainedModel, adapter: FamilySpec) -> int:
    mixture = attach(base, shared=adapter)
    count = sum(parameter.numel() for _, parameter in mixture.named_adapter_parameters())
    mixture.detach()
    return count


def test_existing_biases_are_all_in_the_vision_tower_and_its_connector(base_7b: PreTrainedModel) -> None:
    own = Bias(create=False, placement=Placement(towers=TOWERS, kinds=KINDS, unread=True))
    assert added(base_7b, own) == 280_576


def test_the_base_has_its_published_size(base_7b: PreTrainedModel) -> None:
    assert sum(parameter.numel() for parameter in base_7b.parameters()) == 7_063_427_072
    biases = {name: p.numel() for name, p in base_7b.named_parameters() if name.endswith(".bias")}
    assert sum(biases.values()) == 280_576
    assert not [name for name in biases if "language_model" in name]


@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize("unread", [True, False], ids=["all", "read"])
@pytest.mark.parametrize(
    ("towers", "modules", "of_all", "of_read"),
    [
        (BOTH, QKVO, 38_273_024, 38_076_416),
        (BOTH, (*QKVO, "out_proj"), 39_845_888, 39_583_744),
        (BOTH, ("q_proj", "v_proj"), 19_922_944, 19_791_872),
        (("language",), ("q_proj", "v_proj"), 16_777_216, 16_777_216),
    ],
    ids=["qkvo", "with_out", "qv", "language"],
)
def test_lora_has_the_published_counts(
    base_7b: PreTrainedModel, towers: Any, modules: Any, rank: int, unread: bool, of_all: int, of_read: int
) -> None:
    """Published at rank 32; half as many at rank 16."""
    expected = (of_all if unread else of_read) * rank // 32
    placement = Placement(towers=towers, modules=modules, unread=unread)
    assert added(base_7b, LoRA(rank=rank, placement=placement)) == expected
    vision = (24 if unread else 23) if "vision" in towers else 0
    wide = len(set(modules) - {"out_proj"})  # CLIP calls its output projection out_proj, the decoder o_proj
    thin = len(set(modules) - {"o_proj"})
    assert expected == 2 * rank * (1024 * thin * vision + 4096 * wide * 32)


def _bottleneck(spec: Any, site: Site, module: Any) -> int:
    return 2 * site.out_features * spec.width + spec.width + site.out_features


def _cross_modal(spec: Any, site: Site, module: Any) -> int:
    return 2 * (4 * spec.rank * site.in_features + 1)  # both directions: query, key, value, output, and a gate


def _hydra(spec: Any, site: Site, module: Any) -> int:
    return spec.rank * (site.in_features + 3 * site.out_features)


def _lora(spec: Any, site: Site, module: Any) -> int:
    return spec.rank * (site.in_features + site.out_features)


def _norm_tuning(spec: Any, site: Site, module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _prefix(spec: Any, site: Site, module: Any) -> int:
    linears = {path.rsplit(".", 1)[-1]: each for path, each in module.named_modules() if hasattr(each, "out_features")}
    keys = linears["k_proj"].out_features if "k_proj" in linears else linears["qkv"].out_features // 3
    heads = getattr(module, "num_heads", None) or module.config.num_attention_heads
    return spec.length * 2 * keys + heads  # a key and a value a row, and a gate a head


def _pyramid(spec: Any, site: Site, module: Any) -> int:
    return spec.rank * ((site.in_features + 1) // 2 + (site.out_features + 1) // 2) + 4  # seed and kernel of stride 2


def _scale(spec: Any, site: Site, module: Any) -> int:
    ends = site.kind == "mlp" and site.path.rsplit(".", 1)[-1] in ("down_proj", "fc2", "wo")
    return site.in_features if ends else site.out_features


FORMULAS: dict[str, Callable[[Any, Site, Any], int]] = {
    "bias": lambda spec, site, module: site.out_features,
    "bottleneck": _bottleneck,
    "cross_modal": _cross_modal,
    "hydra": _hydra,
    "lora": _lora,
    "norm_tuning": _norm_tuning,
    "peft": lambda spec, site, module: 2 * 8 * (site.in_features + site.out_features),  # LOHA: two products of rank 8
    "prefix": _prefix,
    "prompt_tokens": lambda spec, site, module: spec.length * site.out_features,
    "pyramid": _pyramid,
    "scale": _scale,
    "soft_slots": lambda spec, site, module: (spec.slots + 2 * spec.width + 1) * site.out_features + spec.width,
}
"""Numbers of one adapter at one site, by family, with the family's default options."""


@pytest.mark.parametrize("name", FAMILIES.names())
def test_a_family_adds_what_its_formula_says_at_every_site(name: str) -> None:
    if name not in FORMULAS:
        pytest.skip(f"no closed form is written down for {name}")
    spec = FAMILIES.get(name)(placement=Placement(towers=TOWERS, kinds=KINDS))
    for model in ("llava", "qwen2_5_vl"):
        base = build(model)
        modules = {site: base.get_submodule(site.path) for site in anatomy(base).sites}
        mixture = attach(base, shared=spec)
        counts = {site: sum(p.numel() for p in bank.parameters()) for site, bank in mixture.banks()}
        assert counts == {site: FORMULAS[name](spec, site, modules[site]) for site in counts}
        assert sum(counts.values()) == sum(p.numel() for _, p in mixture.named_adapter_parameters())
