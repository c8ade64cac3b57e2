"""Ranks by how many directions explain what enters each site, before anything is trained.

Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", section 3. Of the
mean outer product of a site's inputs, the eigenvalues over their sum are the shares of its variance that its directions
explain. The directions of all sites are sorted by share and taken from the top until the budget is spent. As in
`init: eva`, the inputs' mean is not taken off.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moadapt.mixture_spec import MixtureSpec
from moadapt.ranks.allocator import NOTHING_READ, RankAllocator, cost_of, highest, ranks_of, with_ranks
from moadapt.registry import RANKS
from moadapt.sites import Anatomy, Site


@RANKS.register("explained_variance")
@dataclass(frozen=True, kw_only=True)
class ExplainedVariance(RankAllocator):
    """Gives each adapter's ranks to the sites whose inputs have many strong directions; reads training data.

    What an adapter's ranks cost together is its budget, which is never exceeded. Adapters with the same ranks get the
    same. Sites other than linear layers, and those where the rank is 0, stay as they are.

    Args:
        unit: What the budget counts: `ranks`, or their `parameters`, which sorts by share over cost.
        least: Rank that every site keeps, at least 1.
        most: Highest rank of a site; None is twice the rank it had. No rank goes above min(D, F).
        adapters: Names of the adapters to do it for; None is all LoRAs.

    Raises:
        ValueError: A number or the unit is out of range.
    """

    unit: Literal["ranks", "parameters"] = "ranks"
    least: int = 1
    most: int | None = None
    adapters: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.unit not in ("ranks", "parameters"):
            raise ValueError(f"explained_variance got unit={self.unit!r}; give ranks or parameters")
        if self.least < 1 or (self.most is not None and self.most < self.least):
            raise ValueError(f"explained_variance got least={self.least}, most={self.most}; need 1 <= least <= most")

    def reads(self, spec: MixtureSpec, found: Anatomy) -> tuple[Site, ...]:
        """Return the linear sites of the adapters.

        Raises:
            ValueError: There are none, or no LoRA has a name that was given.
        """
        return tuple(dict.fromkeys(site for own in self._linear(spec, found).values() for site in own))

    def plan(self, spec: MixtureSpec, found: Anatomy, means: Mapping[Site, Tensor] = NOTHING_READ) -> MixtureSpec:
        """Return the spec with the ranks handed out anew.

        Raises:
            ValueError: The least ranks cost more than the budget.
        """
        once = {id(mean): shares(mean) for mean in means.values()}
        explained = {site: once[id(mean)] for site, mean in means.items()}
        ranks = {n: {s.path: rank for s, rank in own.items()} for n, own in ranks_of(spec, found).items()}
        for name, own in self._linear(spec, found).items():
            ranks[name] |= {site.path: rank for site, rank in self._handed_out(name, own, explained).items()}
        return with_ranks(spec, ranks)

    def _linear(self, spec: MixtureSpec, found: Anatomy) -> dict[str, dict[Site, int]]:
        """Return by adapter the rank at every linear site where it has one."""
        ranks = ranks_of(spec, found)
        unknown = [name for name in self.adapters or () if name not in ranks]
        if unknown:
            raise ValueError(
                f"explained_variance got adapters={list(self.adapters or ())}; no LoRA is called {unknown[0]!r}; there "
                f"are {', '.join(ranks) or 'none'}"
            )
        linear = {
            name: {site: rank for site, rank in own.items() if rank and site.form == "linear"}
            for name, own in ranks.items()
            if self.adapters is None or name in self.adapters
        }
        if not any(linear.values()):
            raise ValueError("explained_variance hands out ranks of LoRAs at linear layers; this mixture has none")
        return linear

    def _handed_out(self, name: str, own: Mapping[Site, int], explained: Mapping[Site, Tensor]) -> dict[Site, int]:
        cost = {site: cost_of(site) if self.unit == "parameters" else 1 for site in own}
        most = {s: min(self.most or 2 * rank, s.in_features, s.out_features) for s, rank in own.items()}
        least = {site: min(self.least, most[site]) for site in own}
        budget = sum(cost[site] * rank for site, rank in own.items())
        left = budget - sum(cost[site] * rank for site, rank in least.items())
        if left < 0:
            raise ValueError(
                f"explained_variance got least={self.least}, which costs {budget - left} {self.unit} at the sites of "
                f"{name!r}, above its budget of {budget}; give a lower one, or the adapter a higher rank"
            )
        scores = [explained[site][least[site] : most[site]] for site in own]
        costs = torch.tensor([cost[site] for site, found in zip(own, scores, strict=True) for _ in found])
        taken = torch.split(highest(torch.cat(scores), costs, left), [len(found) for found in scores])
        return {site: least[site] + int(more.sum()) for site, more in zip(own, taken, strict=True)}


def shares(mean: Tensor) -> Tensor:
    """Return the shares of the variance that directions explain, greatest first, in float64 on the CPU, (D,).

    Args:
        mean: Mean outer product of inputs, (D, D).
    """
    values: Tensor = torch.linalg.eigvalsh(mean).flip(0).clamp(min=0).double().cpu()
    total = values.sum()
    return values / total if total > 0 else values
