"""Starts at zero: `up` is zero and `down` random."""

import math

import torch
from torch import Tensor

from moadapt.adapters.initial.interface import Initial, Layer
from moadapt.registry import INITIALS


@INITIALS.register("default")
class Uniform(Initial):
    """`down` uniform within 1/sqrt(D), `up` zero, as in the released code of Hu et al., "LoRA"."""

    def factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return `down (r, D)`, uniform, and `up (r, F)`, zero."""
        bound = 1 / math.sqrt(layer.in_features)
        down = torch.empty(layer.rank, layer.in_features, device=layer.device).uniform_(-bound, bound)
        return down, down.new_zeros(layer.rank, layer.out_features)


@INITIALS.register("gaussian")
class Gaussian(Initial):
    """`down` normal with deviation 1/r, `up` zero."""

    def factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return `down (r, D)`, normal, and `up (r, F)`, zero."""
        down = torch.randn(layer.rank, layer.in_features, device=layer.device) / layer.rank
        return down, down.new_zeros(layer.rank, layer.out_features)
