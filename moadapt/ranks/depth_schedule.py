"""Ranks by relative depth: low near the input, high in the middle, medium near the output.

A block `l` of `L` has the depth `u = l / L`; by default `u < 1/4` gets 8, `u < 3/4` gets 32, the rest 16. Depth counts
within each tower, in encoder-decoders within each of the two. It looks at nothing but depth; for ranks that follow the
data see `importance`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from moadapt.mixture import MixtureSpec
from moadapt.ranks.allocator import NOTHING_READ, RankAllocator, cost_of, ranks_of, with_ranks
from moadapt.registry import RANKS
from moadapt.sites import Anatomy, Site

Steps = tuple[tuple[float, int], ...]


@RANKS.register("depth_schedule")
@dataclass(frozen=True, kw_only=True)
class DepthSchedule(RankAllocator):
    """Ranks by relative depth within each tower.

    The scale of an adapter stays that of its own `rank`. Sites outside a stack of blocks, such as the connector's, keep
    their rank.

    Args:
        steps: Pairs of a depth, up to 1, and the rank of blocks before it.
        towers: The same for single towers, by name.
        parameters: How many parameters all adapters may have together; ranks are scaled to come as close as they can,
            and none falls below 1.

    Raises:
        ValueError: Depths do not rise to 1, a rank is below 1, or the budget is.
    """

    steps: Steps = ((0.25, 8), (0.75, 32), (1.0, 16))
    towers: dict[str, Steps] | None = field(default=None, hash=False)
    parameters: int | None = None

    def __post_init__(self) -> None:
        """Check depths and ranks."""
        for steps in (self.steps, *(self.towers or {}).values()):
            depths = [depth for depth, _ in steps]
            if not steps or depths != sorted(set(depths)) or depths[0] <= 0 or depths[-1] != 1:
                raise ValueError(f"a depth schedule's depths rise from above 0 to 1, got {depths}")
            if min(rank for _, rank in steps) < 1:
                raise ValueError(f"a depth schedule has ranks of 1 or more, got {[rank for _, rank in steps]}")

    def plan(self, spec: MixtureSpec, found: Anatomy, means: Mapping[Site, Tensor] = NOTHING_READ) -> MixtureSpec:
        """Return the spec with the schedule's ranks.

        Raises:
            ValueError: The budget does not pay for rank 1 everywhere.
        """
        ranks = {
            name: {site: self._rank(site, found, rank) for site, rank in own.items()}
            for name, own in ranks_of(spec, found).items()
        }
        if self.parameters is not None:
            ranks = _scaled(ranks, self.parameters)
        return with_ranks(spec, {name: {s.path: rank for s, rank in own.items()} for name, own in ranks.items()})

    def _rank(self, site: Site, found: Anatomy, own: int) -> int:
        if site.layer is None or own == 0:
            return own
        first, count = next((f, n) for f, n in found.tower(site.tower).starts() if f <= site.layer < f + n)
        depth = (site.layer - first) / count
        steps = (self.towers or {}).get(site.tower, self.steps)
        return next(rank for until, rank in steps if depth < until)


def _scaled(ranks: dict[str, dict[Site, int]], budget: int) -> dict[str, dict[Site, int]]:
    """Return all ranks times the largest common factor that the budget pays for, rounded down, 1 or more."""

    def times(factor: float) -> dict[str, dict[Site, int]]:
        return {n: {s: max(1, int(r * factor)) if r else 0 for s, r in own.items()} for n, own in ranks.items()}

    def cost(found: dict[str, dict[Site, int]]) -> int:
        return sum(rank * cost_of(site) for own in found.values() for site, rank in own.items())

    low, high = 0.0, 1.0
    if cost(times(low)) > budget:
        raise ValueError(f"depth_schedule got parameters={budget}; rank 1 everywhere takes {cost(times(low))}")
    while cost(times(high)) <= budget and cost(ranks):
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(times(middle)) <= budget else (low, middle)
    return times(low)
