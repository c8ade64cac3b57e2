"""What every law is tested over: families and routers from the registries, routings as values, and placements."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from moadapt import Mixture, Placement, Router, RouterSpec, Routing, RoutingContext, attach, fit_router
from moadapt.adapters import FamilySpec, LoRA
from moadapt.registry import FAMILIES, ROUTERS
from moadapt.router import Scope
from tests.models import PATCHES, llava_batch, randomize, tiny_llava

EXPERTS = ("ask", "tell", "find")
TASKS = list(EXPERTS)
LANGUAGE = Placement()
VISION = Placement(towers=("vision",))
"""Where families that are not causal sit in place of the language tower."""
EVERYWHERE = Placement(towers=("vision", "connector", "language"))
PLACEMENTS = {"language": LANGUAGE, "everywhere": EVERYWHERE}
FAMILY_PARAMS = [pytest.param(family, id=name) for name, family in FAMILIES]
ROUTINGS: dict[str, frozenset[str]] = {  # what a family must take, see `FamilySpec.routes`
    "constant": frozenset(),
    "task": frozenset({"row"}),
    "sequence_dense": frozenset({"row"}),
    "sequence_sparse": frozenset({"row"}),
    "token_dense": frozenset({"row", "token"}),
    "token_sparse": frozenset({"row", "token"}),
    "heads": frozenset({"row", "heads"}),
    "blended": frozenset({"row", "heads", "parameters"}),
}
ROUTING_NAMES = tuple(ROUTINGS)


def family_cases(*, legal: bool = True) -> list[Any]:
    """Parameters (family, name of a routing): those that go together, or those that do not."""
    return [
        pytest.param(family, routing, id=f"{name}-{routing}")
        for name, family in FAMILIES
        for routing, asked in ROUTINGS.items()
        if (asked <= family.routes) is legal
    ]


def tokens_at(family: type[FamilySpec]) -> int:
    """How many tokens of `llava_batch` a family meets in its tower: those of a row, or patches and a class token."""
    return llava_batch()["input_ids"].shape[1] if family.causal else PATCHES + 1


def routing_value(
    name: str, *, rows: int, tokens: int, experts: int = 3, dtype: torch.dtype = torch.float32
) -> Routing:
    """Make one of the canonical routings.

    Args:
        name: One of `ROUTING_NAMES`.
        rows: B.
        tokens: T.
        experts: E.
        dtype: Of the weights.
    """
    generator = torch.Generator().manual_seed(11)

    def dense(*axes: int) -> Tensor:
        return torch.randn(*axes, experts, generator=generator, dtype=dtype).softmax(-1)

    def sparse(*axes: int) -> Routing:
        weights, indices = dense(*axes).topk(min(2, experts), dim=-1)
        return Routing(weights, experts, indices)

    if name == "task":
        found = Routing.of_rows(torch.arange(rows) % experts, experts)
        return Routing(found.weights.to(dtype), experts, found.indices)
    makers = {
        "constant": lambda: Routing.constant(dense()),
        "sequence_dense": lambda: Routing(dense(rows, 1, 1), experts),
        "sequence_sparse": lambda: sparse(rows, 1, 1),
        "token_dense": lambda: Routing(dense(rows, tokens, 1), experts),
        "token_sparse": lambda: sparse(rows, tokens, 1),
        "heads": lambda: Routing(dense(rows, 1, 2), experts),
        "blended": lambda: Routing(dense(rows, 1, 2), experts, combines="parameters"),
    }
    return makers[name]()


@dataclass(frozen=True, kw_only=True)
class Given(RouterSpec):
    """A router spec that gives one value whatever comes."""

    value: Routing
    depends_on: ClassVar[Literal["nothing", "task", "input"]] = "nothing"
    alike: ClassVar[bool] = True

    def build(self, dim: int, num_experts: int) -> "GivenRouter":
        return GivenRouter(self.value)


class GivenRouter(Router):
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, value: Routing) -> None:
        super().__init__()
        self.value = value

    def forward(self, context: RoutingContext) -> Routing:
        return self.value

    def grow(self, count: int) -> None:
        raise NotImplementedError

    def trim(self, keep: Any) -> None:
        raise NotImplementedError


def router_specs(*, scope: Scope | None = None, depends_on: str | None = None) -> Iterator[RouterSpec]:
    """Every registered router in every scope at every place, built from its defaults.

    Args:
        scope: Only this one.
        depends_on: Only routers that depend on this.
    """
    for _, router in ROUTERS:
        if depends_on is not None and router.depends_on != depends_on:
            continue
        for chosen in router.scopes:
            if scope is None or scope == chosen:
                places = ("model",) if router.alike else router.places
                yield from (router(scope=chosen, per=per) for per in places)


def is_legal(router: RouterSpec, placement: Placement) -> bool:
    """Tell whether a router's weights can reach every site of a placement."""
    return placement is LANGUAGE or (router.scope, router.per, router.depends_on) != ("token", "model", "input")


def label(router: RouterSpec) -> str:
    return f"{ROUTERS.name_of(type(router))}-{router.scope}-{router.per}"


def router_cases(*, scope: Scope | None = None, depends_on: str | None = None) -> list[Any]:
    """Parameters (router, placement), illegal pairs left out.

    Each router in each scope is tested at each place with sites in all towers; with sites in the language tower alone
    only where it then reads something else, or could not serve the others. The rest of those is slow.
    """
    return [
        pytest.param(router, placement, id=f"{label(router)}-{where}", marks=[pytest.mark.slow] if slow else [])
        for router in router_specs(scope=scope, depends_on=depends_on)
        for where, placement in PLACEMENTS.items()
        for slow in [placement is LANGUAGE and is_legal(router, EVERYWHERE) and router.per != "model"]
        if is_legal(router, placement)
    ]


def make(
    router: RouterSpec | None,
    placement: Placement = EVERYWHERE,
    *,
    family: type[FamilySpec] = LoRA,
    shared: bool = True,
    fresh: bool = False,
    base: Any = None,
) -> Mixture:
    """Attach three experts to a tiny LLaVA.

    Args:
        router: Of the experts; None leaves them out.
        placement: Of all adapters; a family that is not causal leaves the language tower for the vision tower.
        family: Of all adapters; routers are tested with LoRA.
        shared: Whether there is a shared adapter.
        fresh: Whether adapters and routers keep their initial weights.
        base: Another base.
    """
    if placement == LANGUAGE and not family.causal:
        placement = VISION
    mixture = attach(
        tiny_llava() if base is None else base,
        shared=family() if shared or router is None else None,
        experts=None if router is None else {name: family() for name in EXPERTS},
        router=router,
        placement=placement,
    )
    if not fresh:
        randomize(mixture)
    if router is not None and router.fits_from:
        if "loss" in router.fits_from:
            pytest.importorskip("nevergrad")
        fit_router(mixture, {**inputs_for(mixture.base, llava_batch(seed=5)), "task": TASKS})
    return mixture.eval()


def inputs_for(base: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what a base takes of a batch: pictures in its number type, or none."""
    pixels = batch["pixel_values"].to(base.dtype)
    text = {name: tensor for name, tensor in batch.items() if name != "pixel_values"}
    return text if isinstance(base, LlamaForCausalLM) else {**text, "pixel_values": pixels}


def exact(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs whose numbers are float64."""
    return {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}


def weights_by_place(mixture: Mixture, **inputs: Any) -> dict[str, Tensor]:
    """Run a mixture in float64, where only a leak can show, and return the dense weights of every place."""
    mixture.double()
    with torch.no_grad(), mixture.trace() as trace:
        mixture(**exact(inputs))
    assert all(len(found) == 1 for found in trace.routings.values())
    return {place: found[0] for place, found in trace.routings.items()}
