"""Modules that a foreign adapter has whole: trained ones as changes of full rank, and copies of the base's own.

A linear layer whose weight went from W to W' is a LoRA of rank min(D, F), `W' - W` beside an identity, exactly. So it
is weighed, merged and exported like any other. Axes: D in, of an embedding its words, F out.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moadapt.hub.lora_factors import SiteFactors
from moadapt.hub.pieces import Pieces
from moadapt.quantised import is_quantised
from moadapt.sites import Site

_HOW = "its whole weight less the base's"
_SAME = 0.01
"""Relative difference that rounding to 16 bits explains."""


def matrix(module: Any) -> Tensor:
    """Return the weight of a linear layer or an embedding as a linear map, (F, D).

    Raises:
        ValueError: It is quantised, so that nothing can be taken off it exactly.
    """
    if is_quantised(module):
        raise ValueError("the base's weight is quantised there, from which no change can be told; load it unquantised")
    weight: Tensor = module.weight.detach()
    return weight.T if isinstance(module, Conv1D | nn.Embedding) else weight


def change_of_whole(site: Site, module: Any, pieces: Pieces) -> SiteFactors:
    """Return how a module that was trained whole differs from the base's.

    Args:
        site: Where.
        module: The base's module there.
        pieces: `weight`, and where it has one `base.bias`.

    Raises:
        ValueError: A shape or a number is wrong, or it is no linear layer or embedding.
    """
    if site.form not in ("linear", "embedding"):
        raise ValueError(f"{site.path} was trained whole, but is of form {site.form!r}; linear layers are taken")
    found = nothing_at(site)
    if pieces.has("weight"):
        new, own = pieces.read("weight", tuple(module.weight.shape)), matrix(module)
        if own.is_meta:
            return replace(found, how=_HOW, whole=True)
        exact = torch.promote_types(torch.promote_types(own.dtype, new.dtype), torch.float32)
        turned = new.T if isinstance(module, Conv1D | nn.Embedding) else new
        found = _factored(found, turned.to(exact) - own.to(exact).to(turned.device))
    return with_bias(found, module, pieces)


def nothing_at(site: Site) -> SiteFactors:
    """Return factors of rank 1 that add nothing.

    Args:
        site: Where.
    """
    return SiteFactors(torch.zeros(1, site.in_features), torch.zeros(1, site.out_features))


def with_bias(found: SiteFactors, module: Any, pieces: Pieces) -> SiteFactors:
    """Return factors with the change of the module's own bias, where the file has that bias.

    Args:
        found: Without it.
        module: The base's module.
        pieces: What the file has.

    Raises:
        ValueError: The base has no bias there, or a shape or a number is wrong.
    """
    if not pieces.has("base.bias"):
        return found
    if module.bias is None:
        raise ValueError(f"{pieces.keys['base.bias']} is a bias, but {pieces.path} has none")
    own = module.bias.detach().float()
    new = pieces.read("base.bias", tuple(own.shape)).to(own.dtype)
    how = f"{found.how}, its bias less the base's".removeprefix(", ")
    return replace(found, offset=torch.zeros_like(new) if own.is_meta else new - own.to(new.device), how=how)


def check_copy(module: Any, pieces: Pieces) -> None:
    """Compare what is not said to be trained with the base's own.

    Args:
        module: The base's module.
        pieces: `weight`, `base.bias` or both.

    Raises:
        ValueError: It differs by more than rounding.
    """
    for part, name in (("weight", "weight"), ("base.bias", "bias")):
        own = getattr(module, name, None)
        if not pieces.has(part):
            continue
        if not isinstance(own, Tensor):
            raise ValueError(f"{pieces.path} has no {name}")
        stored = pieces.read(part, tuple(own.shape))
        if own.is_meta:
            continue
        own = own.detach().float()
        if float((stored.to(own) - own).abs().max()) > _SAME * float(own.abs().max()):
            raise ValueError(
                f"its {name} is not the base's, and its configuration does not say that it was trained; the adapter "
                "belongs to another base, or to one whose embeddings were resized"
            )


def _factored(nothing: SiteFactors, change: Tensor) -> SiteFactors:
    """Return a change (F, D) as factors."""
    if not bool(change.any()):
        return replace(nothing, how=_HOW, whole=True)
    identity = torch.eye(min(change.shape), dtype=change.dtype, device=change.device)
    narrow = change.shape[0] <= change.shape[1]
    return SiteFactors(*((change, identity) if narrow else (identity, change.T)), how=_HOW, whole=True)
