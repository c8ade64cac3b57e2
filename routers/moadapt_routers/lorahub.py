"""Constant weights that were searched for, without gradients, on a few examples of a new task.

Huang et al., "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition": minimise the loss of the
examples plus a penalty on the mean of |w| over bounded weights, by nevergrad's NGOpt. Here adapters are mixed by their
outputs, which is exact, where the release weighs the factors of each, so that a weight counts by its square and
adapters get cross terms.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from moadapt.fitting import FittedRouter, Fitting
from moadapt.registry import ROUTERS
from moadapt.router import FitsFrom, RouterSpec, RoutingContext, Scope
from moadapt.routing import Routing


@ROUTERS.register("lorahub")
@dataclass(frozen=True, kw_only=True)
class LoRAHub(RouterSpec):
    """The same weights for every input, searched for on a few examples without gradients; needs nevergrad.

    Args:
        steps: How many weights are tried, at least 1; each costs one pass over the examples.
        bound: Largest size of a weight, above 0; weights may be negative.
        penalty: What the mean size of the weights costs, in nats.
        seed: Of the search.
        per: Kept for symmetry; all places route alike.

    Raises:
        ValueError: A number is out of range.
    """

    steps: int = 40
    bound: float = 1.5
    penalty: float = 0.05
    seed: int = 0

    scopes: ClassVar[tuple[Scope, ...]] = ("sequence",)
    depends_on: ClassVar[Literal["nothing", "task", "input"]] = "nothing"
    alike: ClassVar[bool] = True
    sums_to_one: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if self.steps < 1 or not self.bound > 0 or not self.penalty >= 0 or self.seed < 0:
            raise ValueError(
                f"LoRAHub got steps={self.steps}, bound={self.bound}, penalty={self.penalty}, seed={self.seed}; steps "
                "is at least 1, the bound above 0, penalty and seed 0 or more"
            )

    @property
    def fits_from(self) -> frozenset[FitsFrom]:
        """It looks at the loss of examples alone."""
        return frozenset({"loss"})

    def build(self, dim: int, num_experts: int) -> "LoRAHubRouter":
        """Build the router of one place; `dim` is not used."""
        return LoRAHubRouter(self, num_experts)

    def search(self, loss: Callable[[Tensor], float], num_experts: int) -> Tensor:
        """Return the best weights that were tried, (E,).

        Args:
            loss: Of weights (E,).
            num_experts: E.

        Raises:
            ValueError: nevergrad is not installed.
        """
        try:
            import nevergrad
        except ModuleNotFoundError as error:
            raise ValueError("LoRAHub searches with nevergrad; run `pip install moadapt[search]`") from error
        space = nevergrad.p.Array(init=np.zeros(num_experts)).set_bounds(-self.bound, self.bound)
        space.random_state = np.random.RandomState(self.seed)
        optimizer = nevergrad.optimizers.NGOpt(parametrization=space, budget=self.steps)
        tried: list[tuple[float, Tensor]] = []
        for _ in range(self.steps):
            with warnings.catch_warnings():  # nevergrad starts scipy's search with a width that scipy mends
                warnings.filterwarnings("ignore", message="COBYLA: Invalid RHOEND")
                candidate = optimizer.ask()
            weights = torch.from_numpy(np.array(candidate.value, dtype=np.float32))
            value = loss(weights) + self.penalty * float(weights.abs().mean())
            optimizer.tell(candidate, value)
            tried.append((value, weights))
        return min(tried, key=lambda each: each[0])[1]


class LoRAHubRouter(FittedRouter):
    """Returns the weights that were found.

    Args:
        spec: How to search.
        num_experts: E.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    state: ClassVar[tuple[str, ...]] = ("weights",)

    def __init__(self, spec: LoRAHub, num_experts: int) -> None:
        super().__init__()
        self.spec, self.num_experts = spec, num_experts

    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Return the shape of the weights."""
        return {"weights": (self.num_experts,)}

    def fit(self, fitting: Fitting) -> None:
        """Search."""
        self.remember(weights=self.spec.search(fitting.loss, self.num_experts))

    def forward(self, context: RoutingContext) -> Routing:
        """Return weights (1, 1, 1, E)."""
        weights = self.found("weights")
        return Routing.constant(weights if context.available is None else weights * context.available)

    def grow(self, count: int) -> None:
        """Know `count` more experts, for which it must be fitted again."""
        super().grow(count)
        self.num_experts += count

    def trim(self, keep: Sequence[int]) -> None:
        """Keep these experts' weights."""
        self.num_experts = len(keep)
        if self.fitted:
            self.remember(weights=self.found("weights")[list(keep)])
