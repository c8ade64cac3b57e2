"""Prompt tokens: n learned vectors before each row's first token, as if the prompt began with them.

Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", section 2. The mixture inserts n tokens into
every row (`moadapt.inserting`), and where these enter the language tower the bank puts `sum_e w_e P_e` in their place:
first the tokens of the shared adapter, then those of the experts, which all have one length. They lengthen the sequence
and so change what the base gives from the first step on: a fresh adapter is no identity. Axes: B rows, T tokens,
D features, R stacked tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moadapt.adapters.bank import Adapter
from moadapt.adapters.delta import Delta, NotMergeable
from moadapt.adapters.family import FamilySpec
from moadapt.adapters.stacked import StackedBank
from moadapt.adapters.weighing import all_weights
from moadapt.call import Call
from moadapt.names import SHARED
from moadapt.registry import FAMILIES
from moadapt.routing import Routing
from moadapt.sites import Site


@FAMILIES.register("prompt_tokens")
@dataclass(frozen=True, kw_only=True)
class PromptTokens(FamilySpec):
    """Learned vectors before the first token of each row; they lengthen the sequence.

    Args:
        length: How many, n, 1 or more; each has as many numbers as the base has features.

    Raises:
        ValueError: The length is below 1.
    """

    length: int = 10

    forms: ClassVar[tuple[str, ...]] = ("entry",)
    routes: ClassVar[frozenset[str]] = frozenset({"row"})
    mergeable: ClassVar[bool] = False
    identity: ClassVar[bool] = False
    standalone: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the range."""
        if self.length < 1:
            raise ValueError(f"PromptTokens got length={self.length}; need 1 or more, or leave the adapter out")

    def default_kinds(self) -> tuple[str, ...]:
        """Return the entry of the language tower."""
        return ("entry",)

    def inserts(self) -> int:
        """Return its length."""
        return self.length

    @classmethod
    def bank(cls, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> "PromptTokensBank":
        """Build the stack of the entry."""
        return PromptTokensBank(site, adapters, module)


class PromptTokensBank(StackedBank):
    """All prompt tokens of a mixture, one after the other.

    Args:
        site: The entry.
        adapters: Shared first, then experts.
        module: The frozen block there.
    """

    tensors = ("tokens",)
    slots: Tensor

    def fresh(self, spec: PromptTokens) -> dict[str, Tensor]:
        """Return tokens `(n, D)`, small at random."""
        device = self.owner("tokens").device
        return {"tokens": torch.randn(spec.length, self.site.out_features, device=device) * 0.02}

    def change(self, x: Tensor, y: Tensor, weights: Tensor, call: Call | None) -> Tensor:
        """Return the difference between the weighted tokens and what was inserted for them; zero elsewhere."""
        return self._put(torch.zeros_like(x), x, weights, call)

    def add_to(self, y: Tensor, x: Tensor, routing: Routing | None, call: Call | None = None) -> Tensor:
        """Return what enters with the weighted tokens in their place, without the rounding of what was inserted."""
        return self._put(y, x, all_weights(routing, y), call) if self.names else y

    def delta(self, weights: Tensor) -> Delta:
        """Refuse.

        Raises:
            NotMergeable: Always.
        """
        raise NotMergeable(
            f"{self.site.path}: prompt tokens lengthen the sequence, so no weight of the base can hold them; keep the "
            "mixture, or merge another family"
        )

    def _put(self, y: Tensor, x: Tensor, weights: Tensor, call: Call | None) -> Tensor:
        """Put the tokens where `x` has what was inserted for them; what others added there stays."""
        places = None if call is None else call.inserted
        if places is None:
            return y
        rows, places = torch.arange(len(x), device=x.device).unsqueeze(1), places.to(x.device)
        tokens = self._tokens(weights, places.shape[1]).to(x.dtype)
        return y.index_put((rows, places), tokens + (y[rows, places] - x[rows, places]))

    def _tokens(self, weights: Tensor, count: int) -> Tensor:
        """Return what stands at the inserted tokens, (B|1, n, D)."""
        each = self.spread(weights, "tokens")[:, 0, 0, :, None] * self.stack("tokens")  # (B|1, R, D)
        return each.new_zeros(len(each), count, each.shape[-1]).index_add(1, self.slots, each)

    def _index(self) -> None:
        """Rebuild the maps from stacked tokens to experts and to their places among the inserted ones."""
        super()._index()
        shared = self._sizes.get(SHARED, {}).get("tokens", 0)
        starts = [(0 if a.name == SHARED else shared, self._sizes[a.name]["tokens"]) for a in self._in_order()]
        places = [place for start, size in starts for place in range(start, start + size)]
        self.register_buffer(
            "slots", torch.tensor(places, dtype=torch.long, device=self.owner("tokens").device), persistent=False
        )
