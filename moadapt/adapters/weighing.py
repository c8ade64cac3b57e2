"""How weights of a routing meet what they weigh: shared adapters, heads, low-rank activations, outputs of any shape.

Axes: B rows, T tokens, E experts, H heads, R stacked rows, F features.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from moadapt.routing import Routing


def all_weights(routing: Routing | None, y: Tensor) -> Tensor:
    """Return the shared adapter's weight, 1, and those of the experts, (B|1, T|1, H|1, 1 + E).

    Args:
        routing: Weights of the experts; None where there are none.
        y: Whose device counts.
    """
    if routing is None:
        return torch.ones(1, 1, 1, 1, device=y.device)
    return functional.pad(routing.dense(), (1, 0), value=1.0)


def check_heads(path: str, heads: int, *widths: int) -> None:
    """Refuse widths that the heads of a routing do not divide.

    Args:
        path: Of the site.
        heads: H.
        widths: Numbers of features.

    Raises:
        ValueError: They do not.
    """
    if any(width % heads for width in widths):
        raise ValueError(f"{path}: {heads} routing heads do not divide its widths {widths}; choose a number that does")


def by_feature(weights: Tensor, width: int, path: str) -> Tensor:
    """Give each of H equal slices of the features the weights of its head.

    Args:
        weights: (B|1, T|1, H|1, ...).
        width: F.
        path: Of the site.

    Returns:
        (B|1, T|1, F|1, ...).

    Raises:
        ValueError: H does not divide F.
    """
    heads = weights.shape[2]
    check_heads(path, heads, width)
    return weights if heads == 1 else weights.repeat_interleave(width // heads, dim=2)


def weigh(weights: Tensor, vectors: Tensor, path: str) -> Tensor:
    """Return weighted sums of vectors, in which each of H equal slices of the vectors has weights of its own.

    Args:
        weights: (B|1, T|1, H, R).
        vectors: (R, F).
        path: Of the site.

    Returns:
        (B|1, T|1, F).

    Raises:
        ValueError: H does not divide F.
    """
    heads = weights.shape[2]
    if heads == 1:
        return weights[:, :, 0].to(vectors.dtype) @ vectors
    check_heads(path, heads, vectors.shape[-1])
    slices = rearrange(vectors, "r (h f) -> h r f", h=heads)
    return rearrange(torch.einsum("bthr,hrf->bthf", weights.to(vectors.dtype), slices), "b t h f -> b t (h f)")


def weigh_up(shrunk: Tensor, weights: Tensor, up: Tensor, path: str) -> Tensor:
    """Weigh low-rank activations and map them up, each of H equal slices of the output with weights of its own.

    Args:
        shrunk: (B, T, R).
        weights: (B|1, T|1, H, R).
        up: (R, F).
        path: Of the site.

    Returns:
        (B, T, F).

    Raises:
        ValueError: H does not divide F.
    """
    heads = weights.shape[2]
    if heads == 1:
        return (shrunk * weights[:, :, 0].to(shrunk.dtype)) @ up
    check_heads(path, heads, up.shape[-1])
    slices = rearrange(up, "r (h f) -> h r f", h=heads)
    weighted = shrunk.unsqueeze(2) * weights.to(shrunk.dtype)
    return rearrange(torch.einsum("bthr,hrf->bthf", weighted, slices), "b t h f -> b t (h f)")


def over_features(values: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Give vectors the axes of an output, which at the norms of heads has one axis more.

    Args:
        values: One vector a row and token, (B|1, T|1, F).
        x: What the module was given; its memory tells the axes apart, as heads are split off the features of a token.
        y: (B, T, F), or with an axis of heads before or behind that of tokens.

    Raises:
        ValueError: The output's last axis is not that of the vectors, or heads and tokens cannot be told apart.
    """
    if y.shape[-1] != values.shape[-1]:
        raise ValueError(
            f"an output of shape {tuple(y.shape)} has no features on its last axis, which vectors of "
            f"{values.shape[-1]} features are meant for; leave the site out"
        )
    rows, tokens, features = values.shape
    if tokens == 1:
        return values.reshape(rows, *[1] * (y.ndim - 2), features)
    if y.ndim == 3:
        return values
    alike = y.shape[1] == y.shape[2] == tokens
    if alike and x.stride(1) == x.stride(2):
        raise ValueError(
            f"an input of shape {tuple(x.shape)} has as many heads as tokens and does not tell which is which; use "
            "weights by row, or leave the site out"
        )
    heads_first = x.stride(1) < x.stride(2) if alike else y.shape[1] != tokens
    return values.unsqueeze(1 if heads_first else 2)
