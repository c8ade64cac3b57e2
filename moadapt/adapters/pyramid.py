"""Pyramid: experts of different granularity, all grown from one low-rank seed.

Expert Pyramid Tuning (EPT), its expert part: expert i makes a change of the whole weight from a corner of the seed
`Z = B A` by a transposed convolution whose stride is its kernel's size: `y = y0 + c_i kron(Z[:F/s, :D/s], K_i) x`, with
a kernel `K_i` of (s, s) numbers. A small stride keeps fine detail, a large one spreads few numbers over many features.
Where s does not divide a width, what the product has too much is cut off. The product is never formed: with x read as
blocks X, (D/s, s), it is `B (A X) K^T`, so that experts of one stride share both large products and mix their kernels.
Kernels start at zero and the seed normal, of the size that keeps `Z x` as large as x: kernels learn from the first step
on, the seed from the second. EPT's router, which learns a vector for each task, is no part of the family. Axes: B rows,
T tokens, D in, F out, E experts, H heads of a routing, R rank of the seed, S stride.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from moadapt.adapters.bank import Adapter
from moadapt.adapters.delta import Delta, Factors
from moadapt.adapters.family import FamilySpec
from moadapt.adapters.stacked import StackedBank
from moadapt.adapters.weighing import check_heads
from moadapt.call import Call
from moadapt.registry import FAMILIES
from moadapt.sites import Site


@FAMILIES.register("pyramid")
@dataclass(frozen=True, kw_only=True)
class Pyramid(FamilySpec):
    """Kernels that spread one low-rank seed, common to the adapters of a site, over linear layers (EPT).

    Args:
        rank: Rank of the seed, 1 or more.
        stride: Features that one number of the seed is spread over, in and out; the kernel has stride^2 numbers.
        finest: Smallest stride that adapters of this seed may have; the seed has rank * (D + F) / finest numbers.
        scale: Factor c of the output.
        seed: Which seed of the site; adapters that give another number, rank or finest stride have another one.

    Raises:
        ValueError: A rank or stride is out of range, or the scale is zero or no number.
    """

    rank: int = 8
    stride: int = 2
    finest: int = 2
    scale: float = 1.0
    seed: int = 0

    routes: ClassVar[frozenset[str]] = frozenset({"row", "token", "heads"})

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.rank < 1 or not 1 <= self.finest <= self.stride:
            raise ValueError(
                f"Pyramid got rank={self.rank}, stride={self.stride}, finest={self.finest}; need rank >= 1 and "
                "1 <= finest <= stride"
            )
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"Pyramid got scale={self.scale}; need a finite number other than 0")

    def shares_with(self) -> Hashable:
        """Return what belongs to the seed."""
        return self.rank, self.finest, self.seed

    @classmethod
    def bank(cls, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> "PyramidBank":
        """Build the kernels and the seed of one site."""
        return PyramidBank(site, adapters, module)


def expand(down: Tensor, up: Tensor, kernel: Tensor, wide: int, narrow: int) -> tuple[Tensor, Tensor]:
    """Return low-rank factors of `kron(up^T down, kernel)`, cropped: `kron(B A, K) = kron(B, K) kron(A, 1)`.

    Args:
        down: A, (R, ceil(D / S)).
        up: B transposed, (R, ceil(F / S)).
        kernel: K, (S, S).
        wide: D.
        narrow: F.

    Returns:
        (R S, D) and (R S, F); the first transposed times the second is the transposed change.
    """
    one = torch.eye(len(kernel), dtype=down.dtype, device=down.device)
    return torch.kron(down, one)[:, :wide], torch.kron(up, kernel.mT.contiguous())[:, :narrow]


class PyramidBank(StackedBank):
    """All kernels of one site that have a seed in common, each flat, and the seed.

    The seed trains along with the kernels until one of its adapters is frozen, whose output must not change any more.

    Args:
        site: Where.
        adapters: Shared first, then experts.
        module: The frozen module there.
    """

    tensors = ("kernel",)
    common = ("seed_down", "seed_up")

    def __init__(self, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> None:
        super().__init__(site, adapters, module)
        spec, device = _spec(adapters[0]), self.owner("kernel").device
        wide, narrow = (math.ceil(width / spec.finest) for width in (site.in_features, site.out_features))
        self.seed_down = nn.Parameter(torch.randn(spec.rank, wide, device=device) / math.sqrt(wide))
        self.seed_up = nn.Parameter(torch.randn(spec.rank, narrow, device=device) / math.sqrt(spec.rank))

    def fresh(self, spec: Pyramid) -> dict[str, Tensor]:
        """Return `kernel (S^2,)`, zero; the seed is there already."""
        return {"kernel": torch.zeros(spec.stride**2, device=self.owner("kernel").device)}

    def change(self, x: Tensor, y: Tensor, weights: Tensor, call: Call | None) -> Tensor:
        """Return what the kernels of each stride, mixed by the weights, make of the seed."""
        check_heads(self.site.path, weights.shape[2], self.site.out_features)
        mixed = self._by_stride(self.spread(weights, "kernel") * self.stack("kernel"))
        first, *others = (self._spread_over(x.to(y.dtype), kernel.to(y.dtype)) for kernel in mixed)
        return sum(others, first)

    def delta(self, weights: Tensor) -> Delta:
        """Return the low-rank factors of every stride."""
        mixed = self._by_stride(self.row_weights(weights, "kernel") * self.stack("kernel"))
        down, up = self._factors(mixed)
        return Delta(down.detach(), up.detach())

    def low_rank(self) -> Factors:
        """Return the low-rank factors of every adapter by itself."""
        kernels = self._kernels(self.stack("kernel"))
        ranks = [len(self.seed_down) * stride for stride, _, _ in kernels]
        owners = tuple(name for name, rank in zip(self.names, ranks, strict=True) for _ in range(rank))
        return Factors(owners, *self._factors([kernel * scale for _, kernel, scale in kernels]), self.frozen)

    def trim(self, keep: Sequence[str]) -> None:
        """Drop experts; the seed stays, and trains again if no adapter is frozen any more."""
        super().trim(keep)
        self._hold_seed()

    def freeze(self, name: str) -> None:
        """Move one adapter to the frozen stack of its kind, and keep the seed as it is."""
        super().freeze(name)
        self._hold_seed()

    def _hold_seed(self) -> None:
        for name in self.common:
            self.get_parameter(name).requires_grad_(not self.frozen)

    def _kernels(self, stacked: Tensor) -> list[tuple[int, Tensor, float]]:
        """Part stacked kernels, (..., R), among their adapters: stride, (..., S, S) and scale of each."""
        specs = [_spec(adapter) for adapter in self._in_order()]
        parts = torch.split(stacked, [spec.stride**2 for spec in specs], dim=-1)
        return [
            (spec.stride, rearrange(part, "... (p q) -> ... p q", p=spec.stride), spec.scale)
            for spec, part in zip(specs, parts, strict=True)
        ]

    def _by_stride(self, weighted: Tensor) -> list[Tensor]:
        """Add up weighted kernels, (..., R), of the same stride, each (..., S, S)."""
        found: dict[int, Tensor] = {}
        for stride, kernel, scale in self._kernels(weighted):
            found[stride] = kernel * scale + found[stride] if stride in found else kernel * scale
        return list(found.values())

    def _seed_of(self, stride: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the corner of the seed that a stride spreads over the layer."""
        wide, narrow = (math.ceil(width / stride) for width in (self.site.in_features, self.site.out_features))
        return self.seed_down[:, :wide].to(dtype), self.seed_up[:, :narrow].to(dtype)

    def _spread_over(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Return `kron(Z, K) x` without the product, each of H slices of it by a kernel of its own.

        Args:
            x: (B, T, D).
            kernel: (B|1, T|1, H, S, S).

        Returns:
            (B, T, F).
        """
        stride, width = kernel.shape[-1], self.site.out_features // kernel.shape[2]
        down, up = self._seed_of(stride, x.dtype)
        padded = functional.pad(x, (0, down.shape[1] * stride - x.shape[-1]))
        blocks = rearrange(padded, "b t (d s) -> b t d s", s=stride)
        shrunk = torch.einsum("btds,rd->btrs", blocks, down)
        slices = []
        for head, own in enumerate(kernel.unbind(2)):
            first, last = head * width, (head + 1) * width
            rows = up[:, first // stride : math.ceil(last / stride)]
            middle = torch.einsum("btrs,btqs->btrq", shrunk, own)
            slices.append(torch.einsum("btrq,rf->btfq", middle, rows).flatten(-2)[..., first % stride :][..., :width])
        return slices[0] if len(slices) == 1 else torch.cat(slices, dim=-1)

    def _factors(self, kernels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the low-rank factors of what kernels, (S, S), make of the seed, stacked."""
        wide, narrow = self.site.in_features, self.site.out_features
        found = [expand(*self._seed_of(len(kernel), kernel.dtype), kernel, wide, narrow) for kernel in kernels]
        found = found or [(self.seed_down.new_zeros(0, wide), self.seed_up.new_zeros(0, narrow))]
        return torch.cat([down for down, _ in found]), torch.cat([up for _, up in found])


def _spec(adapter: Adapter) -> Pyramid:
    assert isinstance(adapter.spec, Pyramid), "the mixture groups adapters by family"
    return adapter.spec
