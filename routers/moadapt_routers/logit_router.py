"""What learned routers share: a map from what they read to logits, noise and temperature; each chooses in its own way.

Axes: B rows, T tokens, E experts.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moadapt.router import Router, RouterSpec, RoutingContext, mask_unavailable
from moadapt.routing import Routing
from moadapt_routers.logit_map import LogitMap


@dataclass(frozen=True, kw_only=True)
class LogitRouterSpec(RouterSpec):
    """What learned routers have in common.

    Args:
        temperature: Divides the logits, above 0; lower is sharper.
        end_temperature: What it becomes while training goes on, in equal ratios, and then stays; None is `temperature`.
        noise: Standard deviation of what is added to the logits in training, from 0.
        end_noise: What it becomes while training goes on, in equal steps; None is `noise`.

    Raises:
        ValueError: A temperature is not above 0, or a noise below 0.
    """

    temperature: float = 1.0
    end_temperature: float | None = None
    noise: float = 0.0
    end_noise: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        name = type(self).__name__
        for field in ("temperature", "end_temperature", "noise", "end_noise"):
            value = getattr(self, field)
            least = "above 0" if "temperature" in field else "0 or more"
            if value is not None and not (value > 0 or (value == 0 and "noise" in field)):
                raise ValueError(f"{name} got {field}={value}; it must be {least}")

    @property
    def is_noisy(self) -> bool:
        """Whether there is noise at some time of the training."""
        return self.noise > 0 or bool(self.end_noise)

    @abstractmethod
    def choose(self, logits: Tensor, context: RoutingContext, *, training: bool) -> Routing:
        """Turn logits into a routing.

        Args:
            logits: With temperature and noise, unavailable experts at minus infinity, (B, 1, 1, E) by sequence or
                (B, T, 1, E) by token.
            context: What else is known.
            training: Whether the router is being trained.
        """

    def logit_map(self, dim: int, num_experts: int) -> LogitMap:
        """Build the map from features to logits."""
        return LogitMap(dim, num_experts)

    def build(self, dim: int, num_experts: int) -> "LogitRouter":
        """Build the router of one place.

        Raises:
            ValueError: There are too few experts.
        """
        if num_experts < self.fewest():
            raise ValueError(
                f"{type(self).__name__} needs {self.fewest()} experts or more, but there are {num_experts}; "
                "choose fewer of them, or give more"
            )
        return LogitRouter(self, self.logit_map(dim, num_experts))

    def kept(self, keep: Sequence[int]) -> "LogitRouterSpec":
        """Return what it is for these experts alone, in this order; the same unless it says something of each."""
        return self

    def fewest(self) -> int:
        """Return how many experts there must be."""
        return 1


class LogitRouter(Router):
    """Maps what it reads to logits and lets its spec choose.

    Args:
        spec: How it chooses.
        logit_map: From features to logits.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def __init__(self, spec: LogitRouterSpec, logit_map: LogitMap) -> None:
        super().__init__()
        self.spec, self.linear = spec, logit_map

    def forward(self, context: RoutingContext) -> Routing:
        """Return weights, (B, 1, 1, E|K) or (B, T, 1, E|K), and the logits without noise."""
        features = context.tokens if self.spec.scope == "token" else context.pooled.unsqueeze(1)
        logits = self.linear(features).unsqueeze(2) / self._temperature(context)
        noisy = logits + self._noise(logits, context) if self.training and self.spec.is_noisy else logits
        routing = self.spec.choose(mask_unavailable(noisy, context.available), context, training=self.training)
        return routing.judged_by(logits)

    def grow(self, count: int) -> None:
        """Add experts with small random logits."""
        self.linear.grow(count)

    def trim(self, keep: Sequence[int]) -> None:
        """Keep these experts' logits.

        Raises:
            ValueError: Too few would be left.
        """
        if len(keep) < self.spec.fewest():
            raise ValueError(f"{self.spec} cannot go on with {len(keep)} experts; keep at least {self.spec.fewest()}")
        self.spec = self.spec.kept(keep)
        self.linear.trim(keep)

    def _temperature(self, context: RoutingContext) -> Tensor | float:
        start, end = self.spec.temperature, self.spec.end_temperature
        if end is None or context.progress is None:
            return start if end is None else end
        return start * torch.pow(end / start, context.progress)

    def _noise(self, logits: Tensor, context: RoutingContext) -> Tensor:
        start, end = self.spec.noise, self.spec.end_noise
        size: Tensor | float = start if end is None else end
        if end is not None and context.progress is not None:
            size = start + (end - start) * context.progress
        return torch.randn_like(logits) * size
