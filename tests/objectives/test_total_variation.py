"""Total variation of routing over the tokens of an image."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt import Placement, Routing, RoutingContext, attach
from moadapt.adapters import LoRA
from moadapt.objectives import TotalVariation
from moadapt.routed import Routed, nothing_routed, routed_at
from moadapt.tracing import Observation
from moadapt_routers import Softmax
from tests.conformance.canonical import EVERYWHERE
from tests.models import tiny_llava

NAMES = ("a", "b", "c")


def laid_out(weights: Tensor, image: Tensor, prompt: Tensor | None = None) -> Routed:
    """Rows of tokens, of which some are of images."""
    everything = torch.ones_like(image)
    seen = RoutingContext(image=image, real=everything, prompt=everything if prompt is None else prompt)
    return routed_at(Observation("here", Routing(weights, 3), seen), NAMES, NAMES)


def value(routed: Routed) -> Tensor:
    objective = TotalVariation()
    return objective.value(objective.sums(routed), routed)


def naive(maps: list[Tensor]) -> float:
    """Mean distance over neighbours of several maps (S, S, H, E), pair by pair."""
    found = []
    for grid in maps:
        for i in range(len(grid)):
            for j in range(len(grid)):
                for k, m in ((i + 1, j), (i, j + 1)):
                    if max(k, m) < len(grid):
                        found += [float((grid[i, j, h] - grid[k, m, h]).abs().sum()) / 2 for h in range(grid.shape[2])]
    return sum(found) / len(found)


def test_it_is_the_mean_over_neighbours_of_every_image() -> None:
    torch.manual_seed(0)
    weights = torch.randn(2, 16, 2, 3).softmax(-1)
    image = torch.zeros(2, 16, dtype=torch.bool)
    image[0, 1:10] = image[1, 0:4] = image[1, 7:16] = True  # 3 x 3; 2 x 2 and 3 x 3
    maps = [weights[0, 1:10].view(3, 3, 2, 3), weights[1, 0:4].view(2, 2, 2, 3), weights[1, 7:16].view(3, 3, 2, 3)]
    torch.testing.assert_close(value(laid_out(weights, image)), torch.tensor(naive(maps)))
    prompt = torch.ones_like(image)
    prompt[1, 7:] = False  # what is no prompt does not count
    torch.testing.assert_close(value(laid_out(weights, image, prompt)), torch.tensor(naive(maps[:2])))


def test_a_constant_map_is_zero_and_a_chequered_one_is_one() -> None:
    image = torch.arange(18).expand(1, -1) >= 2
    constant = torch.randn(1, 1, 1, 3).softmax(-1).expand(1, 18, 1, 3)
    assert value(laid_out(constant, image)) == 0
    board = torch.eye(3)[(torch.arange(4)[:, None] + torch.arange(4)).flatten() % 2]
    weights = torch.cat([torch.ones(2, 3) / 3, board])[None, :, None]
    assert value(laid_out(weights, image)) == 1


def test_images_at_the_ends_of_rows_are_not_joined() -> None:
    weights = torch.eye(3)[[0, 0, 0, 0, 1, 1, 1, 1]].view(2, 4, 1, 3)
    assert value(laid_out(weights, torch.ones(2, 4, dtype=torch.bool))) == 0


def test_images_that_are_no_squares_are_refused() -> None:
    with pytest.raises(ValueError, match="takes images for squares of tokens, but 6 image tokens follow each other"):
        value(laid_out(torch.ones(1, 8, 1, 3), torch.arange(8).expand(1, -1) < 6))


def test_without_images_there_is_nothing_to_smooth() -> None:
    text = torch.zeros(2, 4, dtype=torch.bool)
    assert value(laid_out(torch.randn(2, 4, 1, 3).softmax(-1), text)) == 0
    assert value(nothing_routed(NAMES, NAMES, torch.device("cpu"))) == 0


def test_it_smooths_a_router() -> None:
    torch.manual_seed(0)
    image, logits = torch.ones(1, 16, dtype=torch.bool), torch.randn(1, 16, 1, 3, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    first = value(laid_out(logits.softmax(-1), image)).detach()
    for _ in range(100):
        optimizer.zero_grad()
        value(laid_out(logits.softmax(-1), image)).backward()
        optimizer.step()
    assert value(laid_out(logits.softmax(-1), image)).detach() < first / 5


@pytest.mark.parametrize(
    ("router", "placement", "message"),
    [
        (Softmax(), Placement(), 'compares tokens, but .* routes by sequence; use scope="token"'),
        (Softmax(scope="token"), EVERYWHERE, r"the router at (vision|connector)\S+ reads none"),
    ],
    ids=["sequence", "vision"],
)
def test_routers_without_a_map_are_refused(router: Softmax, placement: Placement, message: Any) -> None:
    experts = {name: LoRA() for name in NAMES}
    mixture = attach(tiny_llava(), experts=experts, router=replace(router, per="layer"), placement=placement)
    with pytest.raises(ValueError, match=message):
        TotalVariation().check(mixture, mixture.tasks)
