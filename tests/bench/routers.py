"""What each router costs: its share of a training step, beside peft's X-LoRA and Arrow.

    python -m tests.bench.routers                      # both sizes, float32
    python -m tests.bench.routers --size small --rounds 15 --out routers.json

Eight experts of rank 8 at every linear layer of a Llama-shaped model, one router a layer or a model. Each router runs
beside a twin that is given its weights, once decided: the same products in banks, the same gradients of the weights,
but no router. The share is the median over rounds of the difference of paired CPU times over the whole step; the step
is a ratio to one LoRA of the peft library, as in `routing.py`.
"""

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from rich.console import Console
from rich.table import Table

from moadapt import Router, RouterSpec, Routing, RoutingContext
from moadapt.fitting import Fitting
from moadapt.registry import ROUTERS
from moadapt.router import FitsFrom
from tests.bench.routing import (
    FLOOR,
    REFERENCE,
    SIZES,
    Step,
    Variants,
    cpu_seconds,
    mixture,
    peft_arrow,
    peft_xlora,
)

PEERS: Variants = {"peft X-LoRA": peft_xlora, "peft Arrow top-2": peft_arrow}
GIVEN = ", given"


@dataclass(frozen=True, kw_only=True)
class Given(RouterSpec):
    """Gives what another router decided the first time.

    Args:
        of: That router.
    """

    of: RouterSpec
    depends_on: ClassVar[Literal["nothing", "task", "input"]] = "input"

    @property
    def fits_from(self) -> frozenset[FitsFrom]:
        """As the other router."""
        return self.of.fits_from

    def build(self, dim: int, num_experts: int) -> "GivenRouter":
        """Build the twin of one place."""
        return GivenRouter(self.of.build(dim, num_experts))


class GivenRouter(Router):
    """Asks its twin once."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, twin: Router) -> None:
        super().__init__()
        self.twin, self.known = twin, list[Routing]()
        self.waits = "outputs" in twin.needs  # which a twin that is given weights spares
        self.needs = frozenset({"hidden"}) if self.waits else twin.needs  # type: ignore[misc]

    def forward(self, context: RoutingContext) -> Routing:
        """Return the weights, of which a gradient is asked, as of learned ones."""
        if not self.known:
            self.known.append(_even(context, self.twin) if self.waits else self.twin(context).detached())
        weights = self.known[0].weights
        learned = any(parameter.requires_grad for parameter in self.twin.parameters())
        return replace(self.known[0], weights=weights.detach().requires_grad_(learned))

    def fit(self, fitting: Fitting) -> None:
        """Fit the twin."""
        self.twin.fit(fitting)

    def grow(self, count: int) -> None:
        """Not done here."""
        raise NotImplementedError

    def trim(self, keep: Sequence[int]) -> None:
        """Not done here."""
        raise NotImplementedError


def _even(context: RoutingContext, router: Router) -> Routing:
    assert context.hidden is not None, "it reads hidden states"
    weights = context.hidden.new_ones(*context.hidden.shape[:2], 1, router.num_experts) / router.num_experts
    return Routing(weights, router.num_experts)


def specs() -> dict[str, RouterSpec]:
    """Return every router by sequence or token, per layer or where else it sits, and those over the model."""
    found: dict[str, RouterSpec] = {}
    for name, router in ROUTERS:
        per = "layer" if "layer" in router.places else router.places[0]
        for scope in router.scopes:
            found[f"{name}, {scope}"] = router(scope=scope, per=per)
        if router.depends_on == "input" and "sequence" in router.scopes:
            found[f"{name}, model"] = router(scope="sequence", per="model")
    return found


def twin_of(router: RouterSpec) -> RouterSpec:
    """Return the spec of a router's twin, which sits where it does."""
    if router.depends_on != "input":
        return router
    return Given(of=router, scope=router.scope, per=router.per)


def measure(size: str, names: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """Measure routers at one size, in float32, one after the other: together they fill a machine's memory."""
    groups = [{name: make} for name, make in PEERS.items() if not names]
    for name, spec in specs().items():
        if any(part in name for part in names) or not names:
            groups.append({name: partial(mixture, router=spec), name + GIVEN: partial(mixture, router=twin_of(spec))})
    found: dict[str, dict[str, float]] = {}
    for group in groups:
        steps = {name: make(SIZES[size], torch.float32) for name, make in (FLOOR | group).items()}
        found |= shares(steps, rounds)
    return found


def shares(steps: Mapping[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Return for each variant its median ratio to the reference, and for each router its median share of the step."""
    ratios: dict[str, list[float]] = {name: [] for name in steps if not name.endswith(GIVEN)}
    routed: dict[str, list[float]] = {name: [] for name in ratios if name + GIVEN in steps}
    for turn in range(rounds + 2):
        seconds = {name: cpu_seconds(step) for name, step in steps.items()}
        if turn < 2:  # two rounds warm up
            continue
        for name, values in ratios.items():
            values.append(seconds[name] / seconds[REFERENCE])
        for name, values in routed.items():
            values.append(1 - seconds[name + GIVEN] / seconds[name])
    found = {name: {"step": statistics.median(values)} for name, values in ratios.items()}
    for name, values in routed.items():
        found[name]["router"] = statistics.median(values)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Cost of routers, as shares of a step.")
    parser.add_argument("--size", choices=list(SIZES), action="append")
    parser.add_argument("--only", nargs="+", default=[], help="parts of routers' names")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {size: measure(size, given.only, given.rounds) for size in given.size or list(SIZES)}
    for size, rows in found.items():
        table = Table(title=f"{size}, float32")
        for column in ("router", f"step x {REFERENCE}", "router's share"):
            table.add_column(column, justify="left" if column == "router" else "right")
        for name, row in rows.items():
            table.add_row(name, f"{row['step']:.2f}", f"{row['router']:.1%}" if "router" in row else "")
        Console(file=sys.stdout).print(table)
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
