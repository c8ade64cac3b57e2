"""A foreign LoRA as one of ours: factors, scales and biases of all its sites under one spec.

Ours has one scale for all sites. Where the file has several, the one that most sites have is kept, and the others are
folded into `up`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from moadapt.adapters.lora import LoRA
from moadapt.hub.lora_factors import SiteFactors
from moadapt.hub.lora_settings import LoRASettings
from moadapt.placement import Placement
from moadapt.sites import Anatomy, Site

Number = TypeVar("Number", int, float)


def as_lora(
    found: Mapping[Site, SiteFactors], settings: LoRASettings, parts: Anatomy
) -> tuple[LoRA, dict[str, Tensor]]:
    """Return the spec and the tensors of an adapter.

    Args:
        found: Its factors by site.
        settings: What the configuration says.
        parts: Anatomy of the base.

    Returns:
        A LoRA with a placement of its own, and tensors by site and part.
    """
    ranks = {site.path: len(factors.down) for site, factors in found.items()}
    rank, scale = _most(ranks.values()), _most(factors.scale for factors in found.values()) or 1.0
    biased = any(factors.bias is not None or factors.offset is not None for factors in found.values())
    spec = LoRA(
        rank=rank,
        alpha=scale * rank,
        dropout=settings.dropout if settings.dropout < 1 else 0.0,
        ranks={path: own for path, own in ranks.items() if own != rank} or None,
        placement=placement_at(ranks),
        bias=biased,
    )
    as_said = replace(spec, alpha=settings.alpha, rank_stabilized=settings.rank_stabilized)
    if as_said.scale == scale:
        spec = as_said
    spec = _only_at(spec, ranks, parts)
    tensors = {}
    for site, factors in found.items():
        for part, tensor in _tensors(factors, spec.scale, biased=biased and site.form == "linear").items():
            tensors[f"{site.path}/{part}"] = tensor
    return spec, tensors


def placement_at(paths: Iterable[str]) -> Placement:
    """Return the placement of adapters at these modules, read by the model or not.

    Args:
        paths: Whole paths.
    """
    return Placement(modules=tuple(paths), unread=True)


def _only_at(spec: LoRA, ranks: Mapping[str, int], parts: Anatomy) -> LoRA:
    """Leave out modules whose path only ends like one of these."""
    placed = (spec.placement or Placement()).sites(parts, spec)
    stray = {site.path: 0 for site in placed if site.path not in ranks}
    return replace(spec, ranks={**(spec.ranks or {}), **stray}) if stray else spec


def _tensors(factors: SiteFactors, scale: float, *, biased: bool) -> dict[str, Tensor]:
    """Return what a bank holds, which multiplies it by the spec's scale."""
    ratio = factors.scale / scale
    found = {"down": factors.down, "up": _scaled(factors.up, ratio)}
    if biased:
        bias = torch.zeros(factors.up.shape[1], dtype=torch.float32)
        if factors.bias is not None:
            bias = _scaled(factors.bias, ratio)
        if factors.offset is not None:
            bias = bias.float() + factors.offset / scale
        found["bias"] = bias.unsqueeze(0)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _scaled(tensor: Tensor, ratio: float) -> Tensor:
    """Multiply a tensor, in float32 unless it stays exact."""
    if math.frexp(ratio)[0] in (0.5, 0.0):
        return tensor if ratio == 1 else tensor * ratio
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * ratio


def _most(values: Iterable[Number]) -> Number:
    return Counter(values).most_common(1)[0][0]
