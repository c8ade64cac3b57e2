"""Tokens sorted by the expert that they chose and cut into tiles of equal size, each of one expert.

A tile is padded where an expert's tokens do not fill it. So the work of a sparse routing is one batched product over
tiles, whose number grows with the tokens and hardly with the experts. Axes: N tokens of all rows, E experts, K chosen
experts, M tiles, S tokens a tile.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Where the N K choices of a sparse routing stand in tiles.

    Args:
        expert: The expert of each tile, (M,).
        choice: Which of the choices stands at each place, 0 where a place is padding, (M, S).
        token: Whose choice that is, (M, S).
        filled: 1 where a place is no padding, else 0, (M, S).
        place: Where each choice stands, (N, K).
    """

    expert: Tensor
    choice: Tensor
    token: Tensor
    filled: Tensor
    place: Tensor


def tile(chosen: Tensor, num_experts: int) -> Tiles:
    """Sort choices into tiles.

    Args:
        chosen: Index of each chosen expert, (N, K).
        num_experts: E.
    """
    flat, device = chosen.flatten(), chosen.device
    size = 16 if len(flat) >= 16 * num_experts else 8  # small tiles where experts have few tokens to fill them
    counts = torch.bincount(flat, minlength=num_experts)
    tiles = (counts + size - 1) // size
    first_tile, first_choice = tiles.cumsum(0) - tiles, counts.cumsum(0) - counts
    order = flat.argsort(stable=True)
    places = (first_tile * size - first_choice)[flat[order]] + torch.arange(len(flat), device=device)
    expert = torch.arange(num_experts, device=device).repeat_interleave(tiles)
    choice, filled = flat.new_zeros(len(expert) * size), torch.zeros(len(expert) * size, device=device)
    choice[places], filled[places] = order, 1.0
    place = torch.empty_like(flat)
    place[order] = places
    choice = choice.view(-1, size)
    return Tiles(expert, choice, choice // chosen.shape[1], filled.view(-1, size), place.view(chosen.shape))
