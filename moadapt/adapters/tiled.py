"""The low-rank path of weights that are sparse by token: tiles of tokens that chose the same expert.

`y_n += sum_k w_nk up_e^T s_e (down_e x_n)` with `e` the k-th expert of token n. Each tile of S tokens takes the ranks
of its expert out of the stack; products are batched over tiles, and every token adds up what its choices gave. The
work does not grow with the number of experts, as that of the stacked form does. Axes: N tokens of all rows, E
experts, K chosen experts, M tiles, S tokens a tile, R stacked ranks, Q widest rank of an expert.
"""

from typing import Any

import torch
from torch import Tensor

from moadapt.adapters.lowrank import scatter_rows, take_rows
from moadapt.tiles import Tiles


def add_tiled(
    y: Tensor, x: Tensor, down: Tensor, up: Tensor, weights: Tensor, ranks: Tensor, scale: Tensor, tiles: Tiles
) -> Tensor:
    """Add the chosen experts' terms to `y` in place and return it.

    Args:
        y: Fresh output, (N, F).
        x: Input, (N, D), of the same dtype.
        down: (R, D).
        up: (R, F).
        weights: Weights of the choices, (N, K).
        ranks: Which ranks of the stack an expert has, any index where it has fewer than Q, (E, Q).
        scale: Scale of each of those ranks, 0 where an expert has fewer, (E, Q).
        tiles: Where the choices stand.
    """
    of_tiles = ranks[tiles.expert], scale[tiles.expert].unsqueeze(1)
    return _Tiled.apply(y, x, down, up, weights, *of_tiles, tiles)  # type: ignore[no-any-return, no-untyped-call]


def _weigh(weights: Tensor, scale: Tensor, tiles: Tiles) -> Tensor:
    """Return weight times scale of every rank at every place, 0 at padding, (M, S, Q)."""
    weight = take_rows(weights.flatten(), tiles.choice) * tiles.filled.to(weights.dtype)
    return weight.unsqueeze(-1) * scale


def _collect(at_places: Tensor, tiles: Tiles) -> Tensor:
    """Return for every token the sum over its places, (N, F), of (M, S, F)."""
    flat = at_places.flatten(0, 1)
    first, *others = tiles.place.unbind(1)
    total = flat.index_select(0, first)
    for place in others:
        total += flat.index_select(0, place)
    return total


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        weights: Tensor,
        ranks: Tensor,
        scale: Tensor,
        tiles: Tiles,
    ) -> Tensor:
        shrunk = torch.bmm(take_rows(x, tiles.token), take_rows(down, ranks).mT)
        ctx.tiles = tiles
        ctx.save_for_backward(x, down, up, weights, ranks, scale, shrunk)
        ctx.mark_dirty(y)
        weighted = shrunk * _weigh(weights, scale, tiles)
        return y.add_(_collect(torch.bmm(weighted, take_rows(up, ranks)), tiles))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, weights, ranks, scale, shrunk = ctx.saved_tensors
        tiles, (_, needs_x, needs_down, needs_up, needs_weights, *_) = ctx.tiles, ctx.needs_input_grad
        weight, at_places = _weigh(weights, scale, tiles), take_rows(grad, tiles.token)
        grad_weighted = torch.bmm(at_places, take_rows(up, ranks).mT)
        grad_shrunk = grad_weighted * weight
        grad_x = grad_down = grad_up = grad_weights = None
        if needs_x:
            grad_x = _collect(torch.bmm(grad_shrunk, take_rows(down, ranks)), tiles)
        if needs_down:
            grad_down = scatter_rows(down, ranks, torch.bmm(grad_shrunk.mT, take_rows(x, tiles.token)))
        if needs_up:
            grad_up = scatter_rows(up, ranks, torch.bmm((shrunk * weight).mT, at_places))
        if needs_weights:
            grad_weights = take_rows((grad_weighted * shrunk * scale).sum(-1).flatten(), tiles.place)
        return grad, grad_x, grad_down, grad_up, grad_weights, None, None, None
