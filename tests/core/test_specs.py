"""Specs as JSON: what comes back equals what was given, and wrong fields are all named."""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from moadapt import Placement
from moadapt.adapters import FamilySpec, LoRA
from moadapt.registry import FAMILIES, ROUTERS, Registry
from moadapt.specs import bind, fields_of, from_json, to_json
from moadapt_routers import Constant, TopK
from tests.conformance.canonical import FAMILY_PARAMS, label, router_specs


@dataclass(frozen=True)
class Strict:
    """Has a field without a default."""

    needed: int
    also: int
    free: tuple[str, ...] = ()


def through_text(spec: Any, registry: Registry) -> Any:
    return from_json(json.loads(json.dumps(to_json(spec, registry))), registry)


@pytest.mark.parametrize("router", list(router_specs()), ids=label)
def test_a_router_comes_back(router: Any) -> None:
    assert through_text(router, ROUTERS) == router


@pytest.mark.parametrize(
    "placement",
    [
        None,
        Placement(),
        Placement(towers=("vision", "connector"), kinds=(), depth=(1 / 3, 0.7)),
        Placement(modules=("q_proj", "model.layers.0.mlp.up_proj")),
        Placement(depth={"vision": (0.0, 0.5), "language": (1 / 3, 1.0)}, every=3, unread=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILY_PARAMS)
def test_a_family_comes_back_with_its_placement(family: type[FamilySpec], placement: Placement | None) -> None:
    assert through_text(family(placement=placement), FAMILIES) == family(placement=placement)


@pytest.mark.parametrize(
    ("spec", "registry"),
    [
        (LoRA(rank=3, alpha=0.1, rank_stabilized=True, dropout=1 / 3), FAMILIES),
        (Constant(weights=(0.1, -1e-30, 2 / 3)), ROUTERS),
        (TopK(k=3, scope="token", per="site"), ROUTERS),
    ],
    ids=["LoRA", "Constant", "TopK"],
)
def test_every_number_comes_back_exactly(spec: Any, registry: Registry) -> None:
    assert through_text(spec, registry) == spec


def test_json_holds_the_name_and_plain_values() -> None:
    stored = to_json(LoRA(placement=Placement(depth=(0.5, 1.0), modules=("q_proj",))), FAMILIES)
    placement = {
        "towers": None,
        "kinds": None,
        "depth": [0.5, 1.0],
        "every": 1,
        "modules": ["q_proj"],
        "unread": False,
    }
    assert stored["name"] == "lora"
    assert stored["placement"] == placement
    assert stored == {"name": "lora", **fields_of(LoRA()), "placement": placement}


def test_what_a_user_writes_is_completed_with_defaults() -> None:
    assert from_json({"name": "top_k", "k": 1}, ROUTERS) == TopK(k=1)
    found = from_json({"name": "lora", "placement": {"depth": [0.5, 1]}}, FAMILIES)
    assert found == LoRA(placement=Placement(depth=(0.5, 1)))
    assert from_json({"name": "lora", "placement": "top"}, FAMILIES) == LoRA(placement=Placement.named("top"))


def test_a_class_without_a_short_name_is_stored_by_its_path() -> None:
    stored = to_json(Strict(1, 2, ("x",)), FAMILIES)
    assert stored == {"name": f"{Strict.__module__}.Strict", "needed": 1, "also": 2, "free": ["x"]}
    assert bind(Strict, {"needed": 1, "also": 2, "free": ["x"]}) == Strict(1, 2, ("x",))


@pytest.mark.parametrize("stored", [{}, {"k": 2}, {"name": None}, {"name": 3}], ids=str)
def test_a_spec_without_a_name_is_refused(stored: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"lacks the name of its router; write \{name: \.\.\., field: value\}"):
        from_json(stored, ROUTERS)


def test_an_unknown_name_is_refused_with_the_near_ones() -> None:
    with pytest.raises(ValueError, match=r"no router is called 'topk'; did you mean top_k, top_p\?"):
        from_json({"name": "topk"}, ROUTERS)


def test_a_class_that_is_no_spec_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'pathlib\.Path' is no router, whose specs are dataclasses; there are \["):
        from_json({"name": "pathlib.Path"}, ROUTERS)


def test_all_wrong_fields_are_named_with_the_accepted_ones() -> None:
    with pytest.raises(
        ValueError,
        match=r"Strict got wrong fields \(unknown: typo, worse; missing: also, needed\); it accepts needed, also, free",
    ):
        bind(Strict, {"worse": 1, "typo": 2})
    with pytest.raises(ValueError, match=r"\(missing: also\); it accepts"):
        bind(Strict, {"needed": 1})
    with pytest.raises(ValueError, match=r"TopK got wrong fields \(unknown: kk\); it accepts scope, per, .*, k"):
        from_json({"name": "top_k", "kk": 2}, ROUTERS)
    with pytest.raises(ValueError, match=r"Placement got wrong fields \(unknown: layers\); it accepts towers, kinds"):
        from_json({"name": "lora", "placement": {"layers": [1]}}, FAMILIES)


def test_a_value_out_of_range_is_refused_by_the_spec() -> None:
    with pytest.raises(ValueError, match="TopK got k=0; it must be at least 1"):
        from_json({"name": "top_k", "k": 0}, ROUTERS)


def test_reading_changes_nothing_that_was_given() -> None:
    stored = {"name": "lora", "placement": {"depth": [0.5, 1]}}
    before = json.dumps(stored)
    from_json(stored, FAMILIES)
    assert json.dumps(stored) == before
