"""Clusters of inputs with a weight change each, and as many experts: which routers find who needs which.

Gaussian clusters, each with a rank-2 change of a linear map; experts are LoRAs of rank 2, and the router is trained
with them from the answers and the objectives of its recipe. What no recipe makes pure is said in docs/routers.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt import Router, RouterSpec, Routing, RoutingContext
from moadapt.adapters import Bank
from moadapt.objectives import (
    Importance,
    LoadBalance,
    MutualInformation,
    RoutingObjective,
    TaskCrossEntropy,
    UtilityRanking,
)
from moadapt.registry import ROUTERS
from moadapt.routed import routed_at
from moadapt.tracing import Observation
from tests.planted.toy import OneSite

SEEDS, STEPS, ROWS, RATE = 3, 600, 256, 1e-2
SPECS: dict[str, RouterSpec] = {name: router(scope=router.scopes[0]) for name, router in ROUTERS if name != "fusion"}
LEARNED = [name for name, spec in SPECS.items() if spec.depends_on == "input" and not spec.fits_from]
"""Routers that learn from what reaches them; fusion, which reads experts' outputs, has a test of its own."""


@dataclass(frozen=True)
class Recipe:
    """How a router is trained here.

    Args:
        fields: Of the router.
        objectives: Beside the answers.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    objectives: tuple[RoutingObjective, ...] = (LoadBalance(weight=0.1),)


NOISE = {"noise": 1.0, "end_noise": 0.0}
EVEN, TAUGHT = (LoadBalance(weight=1.0), Importance(weight=0.1)), (TaskCrossEntropy(weight=1.0),)
RECIPES = {
    "softmax": Recipe(NOISE, (LoadBalance(weight=0.3), MutualInformation(weight=0.3, of="input"))),
    "typed": Recipe(NOISE, (LoadBalance(weight=0.3), MutualInformation(weight=0.3, of="input"))),
    "prompt_mlp": Recipe(NOISE, EVEN),
    "remix": Recipe({"k": 1, "samples": 4, **NOISE}, EVEN),
    "threshold": Recipe({}, (UtilityRanking(weight=1.0),)),
    "scenario": Recipe({}, TAUGHT),
    "hard_to_soft": Recipe({}, TAUGHT),
    "meteora": Recipe({}, TAUGHT),
}
"""Those that need more than a little load balance."""


@dataclass(frozen=True)
class Planted:
    """Clusters, and what each does to its inputs.

    Args:
        centres: (C, D).
        deltas: (C, F, D).
    """

    centres: Tensor
    deltas: Tensor

    @classmethod
    def of(cls, clusters: int, width: int) -> "Planted":
        """Plant clusters in `width` dimensions."""
        factors = torch.randn(2, clusters, width, 2) / width**0.25
        return cls(2 * torch.randn(clusters, width), factors[0] @ factors[1].mT)

    def draw(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs (N, D), right outputs (N, F) and clusters (N,)."""
        cluster = torch.randint(len(self.centres), (rows,))
        x = self.centres[cluster] + torch.randn(rows, self.centres.shape[1])
        return x, torch.einsum("bd,bfd->bf", x, self.deltas[cluster]), cluster


def row_losses(bank: Bank, x: Tensor, y: Tensor, routing: Routing) -> Tensor:
    """Return the mean square error of every row, (N,)."""
    found: Tensor = bank(x.unsqueeze(1), torch.zeros_like(y).unsqueeze(1), routing)
    return (found.squeeze(1) - y).square().mean(-1)


def utilities(bank: Bank, x: Tensor, y: Tensor, experts: int) -> Tensor:
    """Return what each expert by itself is worth to each row, (N, E)."""
    with torch.no_grad():
        alone = torch.stack([row_losses(bank, x, y, Routing.constant(one)) for one in torch.eye(experts)], dim=1)
        return row_losses(bank, x, y, Routing.constant(torch.zeros(experts))).unsqueeze(1) - alone


def trained(spec: RouterSpec, planted: Planted, objectives: tuple[RoutingObjective, ...]) -> Router:
    """Train experts and router together and return the router."""
    experts, width = planted.centres.shape
    bank = OneSite({f"expert{index}": 2 for index in range(experts)}, width, width).bank
    router, names = spec.build(width, experts), [str(index) for index in range(experts)]
    optimizer = torch.optim.AdamW([*bank.parameters(), *router.parameters()], lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        x, y, cluster = planted.draw(ROWS)
        seen = RoutingContext(hidden=x.unsqueeze(1), task_ids=cluster, progress=torch.tensor(step / STEPS))
        worth = utilities(bank, x, y, experts) if any(each.needs_utilities for each in objectives) else None
        losses, chances, terms = [], [], []
        for _ in range(spec.passes):
            routing = router(seen)
            losses.append(row_losses(bank, x, y, routing))
            chances.append(routing.log_prob)
            routed = routed_at(Observation("it", routing, seen), names, names, worth)
            terms += [each.weight * each.value(each.sums(routed), routed) for each in objectives]
        loss = torch.stack(losses).mean() + torch.stack(terms).sum() / spec.passes
        if spec.passes > 1:
            loss = loss + spec.policy_loss(torch.stack(chances)[:, :, 0, 0], torch.stack(losses)) / ROWS
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return router.eval()


def purity(router: Router, planted: Planted) -> tuple[float, int]:
    """Return the share of inputs that get their cluster's expert first, and how many experts get hardly any weight.

    An expert that is first in several clusters belongs to one of them; hardly is less than a tenth of the mean weight.
    """
    x, _, cluster = planted.draw(4096)
    experts = len(planted.centres)
    with torch.no_grad():
        weights = router(RoutingContext(hidden=x.unsqueeze(1))).dense().flatten(0, 2)
    first = weights.argmax(-1)
    counts = torch.zeros(experts, experts).index_put((first, cluster), torch.ones(len(x)), accumulate=True)
    own = counts.amax(dim=1).sum()  # each expert keeps its largest cluster
    return float(own / len(x)), int((weights.mean(dim=0) < 0.1 * weights.mean()).sum())


def run(name: str, seed: int, clusters: int, width: int, recipe: Recipe) -> tuple[float, int]:
    """Train one router and judge it."""
    torch.manual_seed(seed)
    planted = Planted.of(clusters, width)
    return purity(trained(replace(SPECS[name], per="model", **recipe.fields), planted, recipe.objectives), planted)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_every_learned_router_finds_the_clusters(name: str) -> None:
    found = [run(name, seed, 4, 16, RECIPES.get(name, Recipe())) for seed in range(SEEDS)]
    print(name, "4 clusters, purity and unused experts:", found)
    if name == "threshold":  # an expert below the bar learns nothing, see docs/routers.md
        assert max(pure for pure, _ in found) >= 0.95
        return
    assert min(pure for pure, _ in found) >= 0.95
    assert all(unused == 0 for _, unused in found)


UNEVEN = {("threshold", 8), ("threshold", 32), ("prompt_mlp", 8), ("remix", 32)}
"""Where one or two experts stay unused on some seed all the same, see docs/routers.md."""
SIZES = [(8, 16), (32, 64)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "clusters", "width"),
    [(name, *size) for size in SIZES for name in LEARNED if (name, size[0]) not in UNEVEN],
)
def test_with_a_balance_no_expert_is_left_unused(name: str, clusters: int, width: int) -> None:
    recipe = RECIPES.get(name, Recipe())
    even = Recipe(
        {**recipe.fields, **NOISE}, (*EVEN, *(o for o in recipe.objectives if isinstance(o, TaskCrossEntropy)))
    )
    found = [run(name, seed, clusters, width, even) for seed in range(SEEDS)]
    print(name, f"{clusters} clusters, purity and unused experts:", found)
    assert all(unused == 0 for _, unused in found)
