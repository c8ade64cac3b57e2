"""Records of routings: for objectives, as they are; for reports, on the CPU."""

from dataclasses import dataclass

from torch import Tensor

from moadapt.router import RoutingContext
from moadapt.routing import Routing
from moadapt.sites import Site


@dataclass(frozen=True)
class Observation:
    """One routing as it was decided, with its graph.

    Args:
        place: Name of the place.
        routing: What the router gave.
        seen: What it could look at: which tokens are prompt, real or image, and the tasks of the rows.
        continues: Whether the call went on from a filled cache, so that it routed tokens that were generated.
        by_sequence: Whether the routing's rows are those of the call, even where others were read.
    """

    place: str
    routing: Routing
    seen: RoutingContext
    continues: bool = False
    by_sequence: bool = False


@dataclass(frozen=True)
class SiteObservation:
    """What entered a site, and how its experts were weighed.

    Args:
        site: Where.
        x: Its input, (B, T, D) or (N, D).
        routing: As it reached the site; None where nothing is routed.
    """

    site: Site
    x: Tensor
    routing: Routing | None


class Trace:
    """Routings decided while it was open, per place, on the CPU.

    Args:
        experts: Names of the experts, in the order of the weights' last axis.
    """

    def __init__(self, experts: tuple[str, ...]) -> None:
        self.experts = experts
        self.routings: dict[str, list[Tensor]] = {}
        """Dense weights (B|1, T|1, H|1, E) by place, one a call that decided there."""
        self.tasks: list[Tensor | None] = []
        """Task indices (B,) of every forward pass, None where none were given."""

    def start(self, task_ids: Tensor | None) -> None:
        """Note the tasks of a forward pass."""
        self.tasks.append(None if task_ids is None else task_ids.cpu())

    def add(self, place: str, routing: Routing) -> None:
        """Note one routing, outside the graph, which a checkpointed block must be able to repeat without a trace."""
        self.routings.setdefault(place, []).append(routing.detached().dense().float().cpu())
