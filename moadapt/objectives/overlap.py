"""How much the adapters of a site do the same thing: overlap matrices, without forming a weight change.

With `A_i (r_i, D)` adapter i's rows of `down` and `B_i (r_i, F)` those of `up`, scale included, `DW_i = B_i^T A_i`:

- deltas: `<DW_i, DW_j>^2 / (|DW_i|^2 |DW_j|^2)`, where `<DW_i, DW_j> = sum[(A_i A_j^T) * (B_i B_j^T)]`
- subspaces: `|Q_i^T Q_j|_F^2 / min(r_i, r_j)`, with Q an orthonormal basis of the rows of A (or of B)
- raw: `|A_i A_j^T|_F^2` (or of B)

The first two lie in 0 to 1 and do not change when an adapter is written in another basis, `(R A, R^-T B)`; raw, the
penalty of Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", section 3, does.
All pairs of a site come from the Gram matrices of its stacked rows, and sites with the same adapters go in one batch.
Axes: S sites, E adapters, R their stacked ranks, D in, F out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from moadapt.adapters.delta import Factors
from moadapt.sites import Site

if TYPE_CHECKING:
    from moadapt.mixture import Mixture

Measure = Literal["deltas", "subspaces", "raw"]
Side = Literal["input", "output"]
_TINY = 1e-12
"""Squared norm of a weight change that counts as none."""
_ROUNDING = 32
"""How many units of rounding of a Gram matrix's diagonal count as nothing."""


@dataclass(frozen=True)
class Overlap:
    """The overlaps at sites with the same adapters.

    Args:
        sites: S of them.
        names: E of them.
        frozen: Names of adapters that no optimiser reaches.
        matrices: Overlap of every pair, (S, E, E).
    """

    sites: tuple[Site, ...]
    names: tuple[str, ...]
    frozen: frozenset[str]
    matrices: Tensor


def overlaps(
    mixture: "Mixture", measure: Measure = "deltas", side: Side = "input"
) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """Return for each site the names of its adapters and how much each pair of them overlaps.

    Adapters of families without low-rank form are left out, and so are sites that have none of the others.

    Args:
        mixture: Any mixture.
        measure: What is compared, see the module.
        side: Which subspaces; does not matter to deltas.

    Returns:
        Names and matrix (E, E) by module path, in model order.
    """
    with torch.no_grad():
        found = {
            site.path: (group.names, matrix)
            for group in grouped_overlaps(mixture, measure, side)
            for site, matrix in zip(group.sites, group.matrices, strict=True)
        }
    return {site.path: found[site.path] for site in mixture.sites if site.path in found}


def grouped_overlaps(mixture: "Mixture", measure: Measure, side: Side = "input") -> Iterator[Overlap]:
    """Return all overlaps, sites with the same adapters together; gradients reach the adapters that are not frozen.

    Args:
        mixture: Any mixture.
        measure: What is compared.
        side: Which subspaces.
    """
    groups: dict[tuple[tuple[str, ...], frozenset[str]], list[tuple[Site, Tensor, Tensor]]] = {}
    for site, factors in _factors(mixture):
        grams = (_gram(factors.down), _gram(factors.up))
        groups.setdefault((factors.owners, factors.frozen), []).append((site, *grams))
    for (owners, frozen), members in groups.items():
        sites, down, up = zip(*members, strict=True)
        names = tuple(dict.fromkeys(owners))
        owner = torch.tensor([names.index(name) for name in owners], device=down[0].device)
        matrices = overlap_matrices(torch.stack(down), torch.stack(up), owner, measure, side)
        yield Overlap(sites, names, frozen, matrices)


def overlap_matrices(down: Tensor, up: Tensor, owner: Tensor, measure: Measure, side: Side = "input") -> Tensor:
    """Return the overlap of every pair of adapters.

    Args:
        down: Gram matrices of the stacked rows of A, (S, R, R).
        up: Those of B, (S, R, R).
        owner: Index of the adapter that each stacked rank belongs to, (R,).
        measure: What is compared.
        side: Which subspaces.

    Returns:
        (S, E, E).
    """
    member = torch.nn.functional.one_hot(owner).to(down)
    if measure == "deltas":
        return _delta_overlap(down * up, member)
    gram = down if side == "input" else up
    return _subspace_overlap(gram, member) if measure == "subspaces" else _blocks(gram.square(), member)


def _delta_overlap(products: Tensor, member: Tensor) -> Tensor:
    inner = _blocks(products, member)
    # What rounding leaves of terms that cancel, as in an adapter that starts as A - A, is no weight change.
    sizes = torch.diagonal(_blocks(products.detach().abs(), member), dim1=1, dim2=2)
    noise = _ROUNDING * torch.finfo(inner.dtype).eps * sizes + _TINY
    norms = torch.diagonal(inner, dim1=1, dim2=2).clamp(min=0) + noise
    return (inner * norms.rsqrt().unsqueeze(1) * norms.rsqrt().unsqueeze(2)).square()


def _subspace_overlap(gram: Tensor, member: Tensor) -> Tensor:
    """Whiten each adapter's rows by the Cholesky factor of its own block; the block-diagonal matrix gives all at once.

    Rows that depend on others, or are zero, add nothing and get no gradient.
    """
    scale = torch.diagonal(gram, dim1=1, dim2=2).clamp(min=torch.finfo(gram.dtype).tiny ** 0.5).rsqrt()
    gram = gram * scale.unsqueeze(1) * scale.unsqueeze(2)
    jitter = _ROUNDING * torch.finfo(gram.dtype).eps * torch.eye(len(member), dtype=gram.dtype, device=gram.device)
    root = torch.linalg.cholesky(gram * (member @ member.T) + jitter)
    half = torch.linalg.solve_triangular(root, gram, upper=False)
    whitened = torch.linalg.solve_triangular(root, half.mT, upper=False)
    sizes = member.sum(dim=0)
    return _blocks(whitened.square(), member) / torch.minimum(sizes[:, None], sizes[None, :])


def _blocks(matrices: Tensor, member: Tensor) -> Tensor:
    """Sum (S, R, R) over the ranks of each pair of adapters, (S, E, E); `member` says whose a rank is, (R, E)."""
    return member.T @ matrices @ member


def _gram(rows: Tensor) -> Tensor:
    exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return exact @ exact.T


def _factors(mixture: "Mixture") -> Iterator[tuple[Site, Factors]]:
    """Return the low-rank forms at each site, those of several families joined."""
    found: dict[Site, list[Factors]] = {}
    for site, bank in mixture.banks():
        factors = bank.low_rank()
        if factors is not None and factors.owners:
            found.setdefault(site, []).append(factors)
    for site, parts in found.items():
        yield site, Factors.join(parts)
