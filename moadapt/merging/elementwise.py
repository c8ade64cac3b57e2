"""Merges that look at every number of the experts' changes: one dense site at a time, one expert after another.

They act on the products `B A`, whose numbers do not depend on the basis that an adapter's factors are written in.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from moadapt.adapters.delta import Delta
from moadapt.merging.deltas import scaled
from moadapt.merging.site_adapters import SiteAdapters

Prune = Callable[[Tensor, torch.Generator], Tensor]
"""Returns an expert's change with some numbers set to 0, given a generator of its own."""
Join = Callable[[Callable[[], Iterator[Tensor]]], Tensor]
"""Puts changes together; what it is given may be gone through more than once."""
Changes = Sequence[tuple[int, Callable[[], Tensor]]]
"""Of each expert, by its index, what makes its change."""
Merged = Callable[[str, Changes], Tensor]
"""Merges one parameter, given its name."""


def elementwise(
    at: SiteAdapters, experts: Sequence[int], prune: Prune, join: Join, *, scale: float, seed: int = 0
) -> list[Delta]:
    """Merge the experts of a site number by number; what all inputs get stays as it is.

    Args:
        at: The site.
        experts: Indices of those that count.
        prune: What is done to each.
        join: How they are put together.
        scale: Factor of what comes out.
        seed: Of the generators, which are a function of it, the site, the parameter and the expert alone.
    """
    own = [(expert, at.own[expert]) for expert in experts]

    def merged(name: str, changes: Changes) -> Tensor:
        keys = [f"{seed}/{at.site.path}/{name}/{expert}" for expert, _ in changes]
        return join(lambda: (prune(make(), _generator(key)) for key, (_, make) in zip(keys, changes, strict=True)))

    whole = _slotwise(own, merged)
    return [at.shared, scaled(whole, scale)]


def added(changes: Callable[[], Iterator[Tensor]]) -> Tensor:
    """Add changes up.

    Args:
        changes: At least one.
    """
    total: Tensor | None = None
    for change in changes():
        total = change.clone() if total is None else total.add_(change)
    assert total is not None, "a site with experts has a change"
    return total


def largest(change: Tensor, density: float) -> Tensor:
    """Keep the largest numbers of a change and set the others to 0.

    Args:
        change: Any shape.
        density: Share that is kept, above 0; rounded, and at least one number.
    """
    kept = max(1, round(density * change.numel()))
    if kept >= change.numel():
        return change
    size = change.abs().flatten()
    threshold = size.kthvalue(change.numel() - kept + 1).values
    return torch.where(change.abs() >= threshold, change, 0.0)


def check_density(name: str, density: float) -> None:
    """Refuse a share that is none.

    Args:
        name: Of the method.
        density: Share of the numbers that are kept.

    Raises:
        ValueError: It is 0 or less, or more than 1.
    """
    if not 0 < density <= 1:
        raise ValueError(f"merge {name!r} got density={density}; give the share of numbers to keep, above 0, up to 1")


def _slotwise(own: Sequence[tuple[int, Delta]], merged: Merged) -> Delta:
    """Merge weight, bias and other parameters, each on its own."""
    like = own[0][1]
    weights = [(expert, delta.weight) for expert, delta in own if delta.moves_weight]
    biases = [(expert, delta.bias.clone) for expert, delta in own if delta.bias is not None]
    parameters = {}
    for name in like.parameters:
        below = [(expert, delta.parameters[name]) for expert, delta in own]
        parameters[name] = _slotwise(below, partial(_named, name, merged))
    return Delta(
        like.down[..., :0, :],
        like.up[..., :0, :],
        merged("weight", weights) if weights else None,
        merged("bias", biases) if biases else None,
        parameters,
    )


def _named(outer: str, merged: Merged, name: str, changes: Changes) -> Tensor:
    return merged(f"{outer}.{name}", changes)


def _generator(key: str) -> torch.Generator:
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(number)
