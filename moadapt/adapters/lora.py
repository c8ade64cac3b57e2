"""LoRA: a low-rank change of a linear layer, `y = W0 x + b0 + s B A x`, or `y = W0 x + b0 + s (B A x + b)`.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", section 4; rsLoRA's scale from Kalajdzievski, "A Rank
Stabilization Scaling Factor". `A` is called `down` and starts uniform within 1/sqrt(D); `B` is called `up` and starts
at zero, so a fresh adapter changes nothing. The bank of a site is in `lora_bank`.
"""

import difflib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from moadapt.adapters.bank import Adapter
from moadapt.adapters.family import FamilySpec
from moadapt.adapters.initial import Initial
from moadapt.adapters.lora_bank import LoRABank
from moadapt.adapters.lora_experts import LoRAExperts
from moadapt.adapters.lora_lookup import LoRALookup
from moadapt.adapters.lora_offset import LoRAOffset
from moadapt.adapters.lora_patches import LoRAPatches
from moadapt.adapters.stacked import StackedBank
from moadapt.placement import Placement
from moadapt.registry import FAMILIES, INITIALS
from moadapt.sites import Anatomy, Site

_BANKS: dict[str, type[StackedBank]] = {
    "linear": LoRABank,
    "embedding": LoRALookup,
    "conv2d": LoRAPatches,
    "experts": LoRAExperts,
}


@FAMILIES.register("lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(FamilySpec):
    """Low-rank adapter of linear layers, and where named of embeddings, convolutions and fused experts.

    Args:
        rank: Width of the bottleneck, 1 or more.
        alpha: Numerator of the scale; None is the rank, which makes the scale 1 (sqrt(rank) with `rank_stabilized`).
        rank_stabilized: Divide alpha by sqrt(rank) instead of rank.
        dropout: Share of inputs dropped in training, 0 to 1; one mask for all adapters of a site.
        lr_ratio: Learning rate of `up` over that of `down`, above 0; about 16 for LoRA+ (Hayou et al., "LoRA+:
            Efficient Low Rank Adaptation of Large Models", section 4). Adapters with another ratio stack apart.
        init: Name of the initial state, see `moadapt list initials`; other ones than `default` are for linear layers.
            `eva` and the two of CorDA wait for data: `moadapt fit` gives it, or `moadapt.initialise`.
        ranks: Ranks that differ, by module path; 0 is no adapter there. The scale stays that of `rank` everywhere, so
            that a rank says how many terms there are and nothing of their size.
        bias: Whether `up` has a bias at linear layers.

    Raises:
        ValueError: A rank, the dropout or the ratio is out of range, or no initial state has that name.
    """

    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False
    dropout: float = 0.0
    lr_ratio: float = 1.0
    init: str = "default"
    ranks: dict[str, int] | None = field(default=None, hash=False)
    bias: bool = False

    forms: ClassVar[tuple[str, ...]] = tuple(_BANKS)

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA got rank={self.rank}, dropout={self.dropout}; need rank >= 1 and 0 <= dropout < 1")
        if not 0 < self.lr_ratio < math.inf:
            raise ValueError(f"LoRA got lr_ratio={self.lr_ratio}; need a finite number above 0, for LoRA+ about 16")
        INITIALS.get(self.init)
        below = {path: rank for path, rank in (self.ranks or {}).items() if rank < 0}
        if below:
            raise ValueError(f"LoRA got ranks={below}; need ranks >= 0, where 0 is no adapter at that site")

    @property
    def scale(self) -> float:
        """The factor s."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def initial(self) -> Initial:
        """Where the factors begin."""
        found: Initial = INITIALS.get(self.init)()
        return found

    def rank_at(self, site: Site) -> int:
        """Return the rank at a site, 0 where the adapter is absent."""
        return (self.ranks or {}).get(site.path, self.rank)

    def shares_with(self) -> Hashable:
        """Return the ratio of its learning rates, one for a parameter, and what tensors it has."""
        return self.lr_ratio, self.initial.shifts, self.bias

    def sites(self, found: Anatomy, default: Placement) -> tuple[Site, ...]:
        """Return the sites of the placement whose rank is not 0.

        Raises:
            ValueError: The placement matches none, or `ranks` names other paths.
        """
        placed = super().sites(found, default)
        paths = [site.path for site in placed]
        for path in self.ranks or ():
            if path not in paths:
                near = ", ".join(difflib.get_close_matches(path, paths, n=3)) or paths[0]
                raise ValueError(f"ranks names {path!r}, which is none of its {len(paths)} sites; near: {near}")
        return tuple(site for site in placed if self.rank_at(site))

    @classmethod
    def bank(cls, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> StackedBank:
        """Build the stack of one site."""
        for adapter in adapters:
            assert isinstance(adapter.spec, LoRA), "the mixture groups adapters by family"
            if adapter.spec.init != "default" and site.form != "linear":
                raise ValueError(
                    f"{site.path} is of form {site.form!r}, where LoRA has no init={adapter.spec.init!r}; place "
                    f"{adapter.name!r} at linear layers only, or leave init as it is"
                )
        spec = adapters[0].spec
        assert isinstance(spec, LoRA), "as above, and banks have adapters"
        bank = LoRAOffset if spec.bias and site.form == "linear" else _BANKS[site.form]
        return bank(site, adapters, module)
