"""Choices sorted into tiles: every choice stands once, in a tile of its expert, whatever the counts."""

import pytest
import torch

from moadapt.tiles import tile


@pytest.mark.parametrize("experts", [1, 3, 40])
@pytest.mark.parametrize(("tokens", "chosen"), [(1, 1), (7, 2), (200, 2), (64, 3)])
def test_every_choice_stands_once_in_a_tile_of_its_expert(tokens: int, chosen: int, experts: int) -> None:
    indices = torch.randint(experts, (tokens, chosen), generator=torch.Generator().manual_seed(tokens + experts))
    tiles = tile(indices, experts)
    assert torch.equal(tiles.choice.flatten()[tiles.place].flatten(), torch.arange(tokens * chosen))
    assert torch.equal(tiles.token, tiles.choice // chosen)
    assert int(tiles.filled.sum()) == tokens * chosen
    assert (tiles.filled.flatten()[tiles.place] == 1).all()
    owner = tiles.expert.repeat_interleave(tiles.choice.shape[1])
    assert torch.equal(owner[tiles.place], indices)


def test_few_tiles_are_padded() -> None:
    indices = torch.arange(64).repeat(32).view(-1, 2) % 64
    assert int(tile(indices, 64).filled.min()) == 1  # 32 choices an expert fill two tiles
    lonely = tile(torch.zeros(100, 1, dtype=torch.long), 50)
    assert len(lonely.expert) == 13  # experts that nobody chose have no tile
    assert set(lonely.expert.tolist()) == {0}
