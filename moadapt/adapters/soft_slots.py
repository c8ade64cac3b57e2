"""Soft slots: bottlenecks that work on a few mixtures of a row's tokens instead of on every token.

Soft-MoA, which puts the routing of Puigcerver et al., "From Sparse to Soft Mixtures of Experts", section 2.1, before
adapters: `y = y0 + C f(D^T X)`. Every slot has a learned vector. Its products with the tokens X give `D`, by a softmax
over the row's real tokens, and `C`, by one over the slots; `f` is a bottleneck on slots, or several with slots of
their own. Here `C` is taken over the slots of one adapter, so that adapters are independent and a router may
weigh what each adds. As every token reads all of its row, it sits only where attention does too: in vision towers and
encoders. `U` and the biases start at zero, so that a fresh adapter changes nothing. Axes: B rows, T tokens, d features,
H heads of a routing, R stacked slots.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from moadapt.adapters.bank import Adapter
from moadapt.adapters.bottleneck import ACTIVATIONS
from moadapt.adapters.delta import Delta, NotMergeable
from moadapt.adapters.family import FamilySpec
from moadapt.adapters.stacked import StackedBank
from moadapt.adapters.weighing import check_heads
from moadapt.call import Call
from moadapt.registry import FAMILIES
from moadapt.sites import Site


@FAMILIES.register("soft_slots")
@dataclass(frozen=True, kw_only=True)
class SoftSlots(FamilySpec):
    """Bottlenecks on soft mixtures of a row's tokens, where attention goes both ways (Soft-MoA).

    Args:
        slots: Mixtures that each bottleneck reads, 1 or more.
        width: Width of each bottleneck, 1 or more.
        bottlenecks: How many there are, 1 or more; the tokens share all of their slots.
        activation: `gelu`, `relu`, `silu`, `tanh` or `identity`.

    Raises:
        ValueError: A number is below 1 or the activation is unknown.
    """

    slots: int = 4
    width: int = 16
    bottlenecks: int = 1
    activation: Literal["gelu", "relu", "silu", "tanh", "identity"] = "gelu"

    forms: ClassVar[tuple[str, ...]] = ("sublayer",)
    routes: ClassVar[frozenset[str]] = frozenset({"row", "token", "heads"})
    mergeable: ClassVar[bool] = False
    causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check ranges and the activation."""
        if min(self.slots, self.width, self.bottlenecks) < 1 or self.activation not in ACTIVATIONS:
            raise ValueError(
                f"SoftSlots got slots={self.slots}, width={self.width}, bottlenecks={self.bottlenecks}, "
                f"activation={self.activation!r}; need numbers of 1 or more and one of {', '.join(ACTIVATIONS)}"
            )

    def shares_with(self) -> Hashable:
        """Return the activation."""
        return self.activation

    @classmethod
    def bank(cls, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> "SoftSlotsBank":
        """Build the stack of one site."""
        return SoftSlotsBank(site, adapters, module)


class SoftSlotsBank(StackedBank):
    """All soft slots of one site, stacked along slots and along the widths of their bottlenecks.

    Args:
        site: Where.
        adapters: Shared first, then experts.
        module: The frozen module there.
    """

    tensors = ("slots", "down", "down_bias", "up", "up_bias")
    vectors = frozenset({"down_bias", "up_bias"})
    bottleneck_of: Tensor
    connected: Tensor

    def __init__(self, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> None:
        self.activation = _spec(adapters[0]).activation
        super().__init__(site, adapters, module)

    def fresh(self, spec: SoftSlots) -> dict[str, Tensor]:
        """Return `slots (n p, d)`, `down (n m, d)`, `down_bias (n m,)`, `up (n m, d)` and `up_bias (n, d)`."""
        width, device = self.site.out_features, self.owner("slots").device
        count, bound = spec.bottlenecks, 1 / math.sqrt(width)
        return {
            "slots": torch.empty(count * spec.slots, width, device=device).uniform_(-bound, bound),
            "down": torch.empty(count * spec.width, width, device=device).uniform_(-bound, bound),
            "down_bias": torch.zeros(count * spec.width, device=device),
            "up": torch.zeros(count * spec.width, width, device=device),
            "up_bias": torch.zeros(count, width, device=device),
        }

    def change(self, x: Tensor, y: Tensor, weights: Tensor, call: Call | None) -> Tensor:
        """Return what every token gets back from the slots."""
        tokens = self._tokens(x.to(y.dtype), call)
        exact = torch.promote_types(y.dtype, torch.float32)
        products = (tokens @ self.stack("slots").to(y.dtype).T).to(exact)  # (B, T, R)
        combine = [part.softmax(dim=-1) for part in torch.split(products, self._counts, dim=-1)]
        shares = torch.cat(combine, dim=-1).to(y.dtype)
        mixed = self._dispatch(products, self._real(tokens, call)).to(y.dtype).mT @ tokens
        return self._give_back(shares, self.spread(weights, "slots").to(y.dtype), self._work(mixed)).reshape(y.shape)

    def delta(self, weights: Tensor) -> Delta:
        """Refuse.

        Raises:
            NotMergeable: Always.
        """
        raise NotMergeable(
            f"{self.site.path}: soft slots add what they read from other tokens, which no weight of a module can hold; "
            "keep the mixture, or merge another family"
        )

    def _index(self) -> None:
        """Rebuild the maps between slots, widths and bottlenecks."""
        super()._index()
        specs, device = [_spec(adapter) for adapter in self._in_order()], self.owner("slots").device
        self._counts = [spec.bottlenecks * spec.slots for spec in specs]
        slots, widths = (
            torch.tensor([getattr(spec, name) for spec in specs for _ in range(spec.bottlenecks)], dtype=torch.long)
            for name in ("slots", "width")
        )
        of_slot, of_width = (torch.arange(len(each)).repeat_interleave(each).to(device) for each in (slots, widths))
        self.register_buffer("bottleneck_of", of_slot, persistent=False)
        self.register_buffer("connected", of_slot[:, None] == of_width, persistent=False)

    def _tokens(self, x: Tensor, call: Call | None) -> Tensor:
        """Return the tokens of every row, (B, T, d), those of a grid in one axis.

        Raises:
            ValueError: The tokens of several rows may stand in one axis.
        """
        if x.ndim > 3:
            return x.flatten(1, -2)
        if call is not None and len(x) == 1 and call.num_rows > 1:
            raise ValueError(
                f"{self.site.path} gets one axis of tokens for {call.num_rows} rows, and soft slots would mix them; "
                "run rows one by one, or choose another family"
            )
        return x

    def _real(self, x: Tensor, call: Call | None) -> Tensor | None:
        """Return which tokens are no padding, (B, T); None where no mask is known."""
        if call is None or call.real is None or self.site.tower != "language" or call.real.shape != x.shape[:2]:
            return None
        return call.real

    def _dispatch(self, products: Tensor, real: Tensor | None) -> Tensor:
        """Return how much of each token every slot takes, (B, T, R); a row of padding gives nothing."""
        if real is None:
            return products.softmax(dim=1)
        shares = products.masked_fill(~real.unsqueeze(-1), torch.finfo(products.dtype).min).softmax(dim=1)
        return shares * real.unsqueeze(-1)

    def _work(self, mixed: Tensor) -> Tensor:
        """Return what its bottleneck makes of every slot, (B, R, d)."""
        down, bias, up, up_bias = (self.stack(name).to(mixed.dtype) for name in self.tensors[1:])
        middle = ACTIVATIONS[self.activation](functional.linear(mixed, down, bias)) * self.connected
        return middle @ up + up_bias.index_select(0, self.bottleneck_of)

    def _give_back(self, shares: Tensor, weights: Tensor, worked: Tensor) -> Tensor:
        """Return each token's share of the slots, each of H slices of the features with weights of its own.

        Args:
            shares: (B, T, R).
            weights: (B|1, T|1, H, R).
            worked: (B, R, d).

        Returns:
            (B, T, d).
        """
        heads = weights.shape[2]
        check_heads(self.site.path, heads, worked.shape[-1])
        if heads == 1:
            return (shares * weights[:, :, 0]) @ worked
        slices = rearrange(worked, "b r (h f) -> b h r f", h=heads)
        weighted = rearrange(shares.unsqueeze(2) * weights, "b t h r -> b h t r")
        return rearrange(weighted @ slices, "b h t f -> b t (h f)")


def _spec(adapter: Adapter) -> SoftSlots:
    assert isinstance(adapter.spec, SoftSlots), "the mixture groups adapters by family"
    return adapter.spec
