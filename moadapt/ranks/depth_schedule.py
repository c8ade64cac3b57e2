"""Ranks by relative depth: low near the input, high in the middle, medium near the output.

A block `l` of `L` has the depth `u = l / L`; by default `u < 1/4` gets 8, `u < 3/4` gets 32, the rest 16. Depth counts
within each tower, in encoder-decoders within each of the two. It looks at nothing but depth; for ranks that follow the
data see `importance`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from moadapt.adapters.lora import LoRA
from moadapt.mixture_spec import MixtureSpec
from moadapt.ranks.allocator import NOTHING_READ, RankAllocator, cost_of, ranks_of, with_ranks
from moadapt.registry import RANKS
from moadapt.sites import Anatomy, Site
from moadapt.towers import TOWERS

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
        parameters: How many parameters all LoRAs may have together; other families are not counted. The schedule's
            ranks are scaled by one factor, and what rounding leaves goes to those that it cut most. None falls below 1
            or rises above the widths of its site.

    Raises:
        ValueError: Depths do not rise to 1, a rank is below 1, or there is no such tower.
    """

    steps: Steps = ((0.25, 8), (0.75, 32), (1.0, 16))
    towers: dict[str, Steps] | None = field(default=None, hash=False)
    parameters: int | None = None

    def __post_init__(self) -> None:
        """Check depths, ranks and towers."""
        if unknown := [name for name in self.towers or () if name not in TOWERS]:
            raise ValueError(f"a depth schedule names {', '.join(unknown)}; choose from {', '.join(TOWERS)}")
        for steps in (self.steps, *(self.towers or {}).values()):
            depths = [depth for depth, _ in steps]
            if not steps or depths != sorted(set(depths)) or depths[0] <= 0 or depths[-1] != 1:
                raise ValueError(f"a depth schedule's depths rise from above 0 to 1, got {depths}")
            if min(rank for _, rank in steps) < 1:
                raise ValueError(f"a depth schedule has ranks of 1 or more, got {[rank for _, rank in steps]}")

    def plan(self, spec: MixtureSpec, found: Anatomy, means: Mapping[Site, Tensor] = NOTHING_READ) -> MixtureSpec:
        """Return the spec with the schedule's ranks.

        Raises:
            ValueError: There are no LoRAs, or the budget does not pay for rank 1 in every block.
        """
        if not any(isinstance(adapter.spec, LoRA) for adapter in spec.adapters()):
            raise ValueError("ranks by depth need LoRAs; this mixture has none")
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
    """Return ranks whose cost comes close to a budget from below; those outside a stack of blocks stay.

    Blocks have the largest common factor of theirs that the budget pays for, rounded down; what is left is spent one
    rank each, on the largest remainders first.
    """
    places = [(name, site) for name, own in ranks.items() for site, rank in own.items() if rank]
    moved = [place for place in places if place[1].layer is not None]
    fixed = sum(ranks[n][site] * cost_of(site) for n, site in places if site.layer is None)

    def wanted(place: tuple[str, Site], factor: float) -> float:
        name, site = place
        return min(max(1.0, ranks[name][site] * factor), float(min(site.in_features, site.out_features)))

    def cost(factor: float) -> int:
        return fixed + sum(int(wanted(place, factor)) * cost_of(place[1]) for place in moved)

    if cost(0.0) > budget:
        raise ValueError(f"depth_schedule got parameters={budget}; rank 1 in every block takes {cost(0.0)}")
    widest = max((min(site.in_features, site.out_features) for _, site in moved), default=0)
    factor = _largest(lambda each: cost(each) <= budget, widest)
    new = {place: int(wanted(place, factor)) for place in moved}
    left = budget - cost(factor)
    for place in sorted(moved, key=lambda each: round(new[each] - wanted(each, factor), 9)):
        if new[place] < wanted(place, factor) and cost_of(place[1]) <= left:
            new[place] += 1
            left -= cost_of(place[1])
    return {n: {site: new.get((n, site), rank) for site, rank in own.items()} for n, own in ranks.items()}


def _largest(fits: Callable[[float], bool], most: int) -> float:
    """Return the largest factor up to `most` that fits; 0 does."""
    low, high = 0.0, float(most)
    if fits(high):
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
