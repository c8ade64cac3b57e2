"""All adapters of one site, as true changes of its weights: what every merge method starts from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moadapt.adapters.bank import Bank
from moadapt.adapters.delta import Delta
from moadapt.merging.deltas import compact, total, without
from moadapt.routing import Routing
from moadapt.sites import Site


@dataclass(frozen=True)
class SiteAdapters:
    """The adapters of one site.

    Args:
        site: Where.
        banks: One a family.
        num_experts: E, those that are absent here included.
    """

    site: Site
    banks: Sequence[Bank]
    num_experts: int

    @property
    def has_experts(self) -> bool:
        """Whether the router weighs any adapter here."""
        return any(bank.has_experts for bank in self.banks)

    @cached_property
    def shared(self) -> Delta:
        """What all inputs get."""
        return compact(total([bank.delta(self._none) for bank in self.banks]))

    @cached_property
    def own(self) -> tuple[Delta, ...]:
        """What each expert by itself would add with weight 1, of rank 0 where it is absent."""
        shared = total([bank.delta(self._none) for bank in self.banks])
        ones = torch.eye(self.num_experts)
        whole = (total([bank.delta(one) for bank in self.banks]) for one in ones)
        return tuple(compact(without(each, shared)) for each in whole)

    def blend(self, weights: Tensor | Routing) -> list[Delta]:
        """Return the exact change under fixed weights, one a family.

        Args:
            weights: (E,), or a routing (1, 1, H, E) where heads or parameters count.
        """
        if isinstance(weights, Tensor):
            return [bank.delta(weights) for bank in self.banks]
        return [b.delta_of_heads(weights) if b.has_experts else b.delta(self._none) for b in self.banks]

    @property
    def _none(self) -> Tensor:
        return torch.zeros(self.num_experts)
