"""Routing by retrieval: each expert is known by the mean of a few examples, and an input goes to the nearest ones.

As prototype retrieval in continual learning, such as APER of Zhou et al., "Revisiting Class-Incremental Learning with
Pre-Trained Models", section 4, with experts for classes: the logit of expert e is the cosine of the input's pooled
features and their mean over the example rows of the task that bears its name, divided by the temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from moadapt.fitting import FittedRouter, Fitting
from moadapt.registry import ROUTERS
from moadapt.router import FitsFrom, Per, Reads, RoutingContext, Scope
from moadapt.routing import Routing
from moadapt_routers.retrieval import RetrievalSpec


@ROUTERS.register("prototypes")
@dataclass(frozen=True, kw_only=True)
class Prototypes(RetrievalSpec):
    """The k experts whose examples an input resembles most; fitted to a few rows of each task, not trained.

    Over the model it reads the prompt, its text and its image apart; elsewhere what enters its place.
    """

    per: Per = "model"
    temperature: float = 0.05

    scopes: ClassVar[tuple[Scope, ...]] = ("sequence",)

    @property
    def reads(self) -> Reads:  # type: ignore[override]
        """The prompt over the model, whose text would drown in its image were they averaged."""
        return "prompt" if self.per == "model" else "place"

    @property
    def fits_from(self) -> frozenset[FitsFrom]:
        """It looks at examples alone."""
        return frozenset({"examples"})

    def router(self, dim: int, num_experts: int) -> "PrototypeRouter":
        """Build the router of one place."""
        return PrototypeRouter(self, dim, num_experts)


class PrototypeRouter(FittedRouter):
    """Compares inputs with one vector an expert.

    Args:
        spec: How many experts an input gets, and how sharply.
        dim: D.
        num_experts: E.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    state: ClassVar[tuple[str, ...]] = ("means",)

    def __init__(self, spec: Prototypes, dim: int, num_experts: int) -> None:
        super().__init__()
        self.spec, self.dim, self.num_experts = spec, dim, num_experts

    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Return the shape of the means."""
        return {"means": (self.num_experts, self.dim)}

    def fit(self, fitting: Fitting) -> None:
        """Average the examples of each expert.

        Raises:
            ValueError: An expert has none.
        """
        features, experts = fitting.examples.features, fitting.examples.experts
        rows = [features[experts == expert] for expert in range(len(fitting.experts))]
        missing = [name for name, own in zip(fitting.experts, rows, strict=True) if not len(own)]
        if missing:
            raise ValueError(
                f"there is no example of {', '.join(missing)}; give batches with `task` and rows of every expert"
            )
        self.remember(means=functional.normalize(torch.stack([own.mean(dim=0) for own in rows]), dim=-1))

    def forward(self, context: RoutingContext) -> Routing:
        """Return sparse weights, (B, 1, 1, K), with their indices and the logits of all experts."""
        return self.spec.choose(self.cosines(context.pooled)[:, None, None], context.available)

    def cosines(self, features: Tensor) -> Tensor:
        """Return the cosine of features (B, D) with each expert's mean, (B, E)."""
        with torch.autocast(features.device.type, enabled=False):
            return functional.normalize(features.float(), dim=-1) @ self.found("means").float().T

    def grow(self, count: int) -> None:
        """Know `count` more experts, for which it must be fitted again."""
        super().grow(count)
        self.num_experts += count

    def trim(self, keep: Sequence[int]) -> None:
        """Keep the means of these experts.

        Raises:
            ValueError: Fewer than k would be left.
        """
        self.spec.check_count(len(keep))
        self.num_experts = len(keep)
        if self.fitted:
            self.remember(means=self.found("means")[list(keep)])
