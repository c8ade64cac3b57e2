"""Bias: an offset of a module's output, `y = W0 x + b0 + db`.

Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models", section
3, where the biases themselves are trained; here each adapter keeps an offset of its own, so that several share one
base. Offsets start at zero. Axes: B rows, T tokens, F out, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moadapt.adapters.bank import Adapter
from moadapt.adapters.delta import Delta
from moadapt.adapters.family import FamilySpec
from moadapt.adapters.stacked import StackedBank
from moadapt.adapters.weighing import over_features, weigh
from moadapt.call import Call
from moadapt.registry import FAMILIES
from moadapt.sites import Site


@FAMILIES.register("bias")
@dataclass(frozen=True, kw_only=True)
class Bias(FamilySpec):
    """Offsets of the biases of linear layers and norms (BitFit).

    Args:
        create: Whether linear layers without a bias get one too; many decoders have no bias at all.
        norms: Whether biases of norms count; a norm without one is left out.
    """

    create: bool = True
    norms: bool = True

    forms: ClassVar[tuple[str, ...]] = ("linear", "norm")

    def default_kinds(self) -> tuple[str, ...]:
        """Return those of the blocks' biases."""
        return ("attention", "mlp", "norm")

    def lacks(self, site: Site) -> str | None:
        """Say which biases are left out."""
        if site.form == "norm":
            if not self.norms:
                return "norms are left out; norms=True takes them in"
            return None if site.has_bias else "a norm without a bias cannot be given one"
        return None if site.has_bias or self.create else "it has no bias; create=True gives it one"

    @classmethod
    def bank(cls, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> "BiasBank":
        """Build the stack of one site."""
        return BiasBank(site, adapters, module)


class BiasBank(StackedBank):
    """All offsets of one site."""

    tensors = ("bias",)
    vectors = frozenset(tensors)

    def fresh(self, spec: Bias) -> dict[str, Tensor]:
        """Return `bias (1, F)`, zero."""
        return {"bias": torch.zeros(1, self.site.out_features, device=self.owner("bias").device)}

    def change(self, x: Tensor, y: Tensor, weights: Tensor, call: Call | None) -> Tensor:
        """Return the weighted offset of every token."""
        offset = weigh(self.spread(weights, "bias"), self.stack("bias").to(y.dtype), self.site.path)
        return over_features(offset, x, y).expand_as(y)

    def delta(self, weights: Tensor) -> Delta:
        """Return a change of the bias alone."""
        bias = self.blend(weights, "bias")
        return self.full_delta(bias.new_zeros(bias.shape) if self.site.form == "norm" else None, bias)
