"""Factors of a foreign LoRA at one module of the base, as a mixture has them.

Axes: r ranks, D in, F out, V words, C channels in.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moadapt.adapters.initial import Layer
from moadapt.hub.lora_settings import LoRASettings
from moadapt.hub.pieces import Pieces
from moadapt.registry import INITIALS
from moadapt.sites import Site


@dataclass(frozen=True)
class SiteFactors:
    """What an adapter adds at one site, `scale * (up^T down x + bias) + offset`.

    Args:
        down: (r, D).
        up: (r, F).
        scale: Its factor.
        bias: (F,).
        offset: (F,).
        how: How it was converted; empty where the tensors are those of the file.
        whole: Whether they come from a module that was trained whole.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    bias: Tensor | None = None
    offset: Tensor | None = None
    how: str = ""
    whole: bool = False


def factors_at(site: Site, module: nn.Module, pieces: Pieces, settings: LoRASettings) -> SiteFactors:
    """Return the factors that a file has for a site.

    Args:
        site: Where.
        module: The base's module there.
        pieces: What the file has.
        settings: What the configuration says.

    Raises:
        ValueError: A half is missing, or a shape, a rank or a number is wrong.
    """
    first, second = ("embedding_A", "embedding_B") if pieces.has("embedding_A", "embedding_B") else ("A", "B")
    if not (pieces.has(first) and pieces.has(second)):
        half = next((part for part in (first, second) if pieces.has(part)), "B.bias")
        raise ValueError(f"only {half} is there, and its other half is missing")
    if (first == "A") == (site.form == "embedding"):
        raise ValueError(f"it has {first} and {second}, which are not those of a module of form {site.form!r}")
    rank = _rank(pieces, first, settings)
    one, other = _shapes(site, module, rank)
    down = pieces.read(first, one).reshape(rank, -1)
    up = pieces.read(second, other).reshape(site.out_features, rank).T
    bias = pieces.read("B.bias", (site.out_features,)) if pieces.has("B.bias") else None
    if settings.bias and bias is None and site.form == "linear":
        raise ValueError("the configuration has lora_bias, but there is none")
    if bias is not None and site.form != "linear":
        raise ValueError(f"a bias at a module of form {site.form!r} is not taken, only at linear layers")
    return SiteFactors(down, up, _scale(pieces, rank, settings), bias)


def without_start(found: SiteFactors, site: Site, weight: Tensor, start: str) -> SiteFactors:
    """Take off what was taken off the base's weight before training, `s (B A - B0 A0)`, of twice the rank.

    Args:
        found: Factors as in the file, whose base was changed.
        site: Where.
        weight: The base's own weight, (F, D).
        start: Name of the initial state, which follows from the weight alone.

    Raises:
        ValueError: The rank is more than the weight has.
    """
    how = f"less the {start} start that was taken off its base"
    if weight.is_meta:
        return replace(found, how=how)
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    layer = Layer(site.in_features, site.out_features, len(found.down), found.scale, weight.device, lambda: exact)
    down, up = INITIALS.get(start)().factors(layer)
    return less(found, down, up, how)


def less(found: SiteFactors, down: Tensor, up: Tensor, how: str) -> SiteFactors:
    """Return factors less others of the same scale, side by side.

    Args:
        found: From which.
        down: (r, D).
        up: (r, F).
        how: What that is.
    """
    exact = torch.promote_types(found.down.dtype, torch.float32)
    sides = (
        torch.cat([found.down.to(exact), down.to(found.down.device, exact)]),
        torch.cat([found.up.to(exact), -up.to(found.up.device, exact)]),
    )
    return replace(found, down=sides[0], up=sides[1], how=how)


def _rank(pieces: Pieces, first: str, settings: LoRASettings) -> int:
    shape = pieces.shape(first)
    if len(shape) < 2 or not math.prod(shape):
        raise ValueError(
            f"{pieces.keys[first]} has shape {shape}; it was saved in pieces (ZeRO-3, FSDP) and is not whole"
        )
    said = settings.rank_at(pieces.path, pieces.written)
    if said not in (None, shape[0]):
        raise ValueError(f"{pieces.keys[first]} has rank {shape[0]}, but its configuration says {said}")
    return shape[0]


def _shapes(site: Site, module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes that both halves must have."""
    if isinstance(module, nn.Conv2d):
        if set(module.dilation) != {1} or module.padding_mode != "zeros":
            raise ValueError(f"{site.path} convolves with dilation or padding that peft's LoRA does not follow")
        return (rank, module.in_channels, *module.kernel_size), (site.out_features, rank, 1, 1)
    return (rank, site.in_features), (site.out_features, rank)


def _scale(pieces: Pieces, rank: int, settings: LoRASettings) -> float:
    if not pieces.has("alpha"):
        return settings.scale_at(rank, pieces.path, pieces.written)
    stored = pieces.tensors["alpha"]
    if math.prod(stored.shape) != 1:
        raise ValueError(f"{pieces.keys['alpha']} has shape {stored.shape}, but must be a single number")
    return float(pieces.read("alpha").item()) / rank
