"""Routing that knows what it does not know: rows unlike the examples get no expert, and the shared adapter alone acts.

A row is refused when its score is above a threshold: minus the energy of the logits (Liu et al., "Energy-based
Out-of-distribution Detection"), minus the largest logit (Hendrycks and Gimpel, "A Baseline for Detecting Misclassified
and Out-of-Distribution Examples in Neural Networks", on logits), or the distance to the examples. The threshold is the
conformal quantile of rows that nothing was fitted to, so that of new rows like these at most a chosen share is refused.
Axes: N examples, B rows, E experts, C centres, D features.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from moadapt.fitting import FittedRouter, Fitting
from moadapt.registry import ROUTERS
from moadapt.router import FitsFrom, Reads, Router, RouterSpec, RoutingContext, Scope
from moadapt.routing import Routing
from moadapt_routers.softmax import Softmax


@ROUTERS.register("abstain")
@dataclass(frozen=True, kw_only=True)
class Abstain(RouterSpec):
    """Another router, except for rows that are unlike the examples it was calibrated on; those get no expert.

    Args:
        router: The other router, by sequence; its `per` counts. None is a softmax.
        score: What tells rows apart: the `energy` of its logits, its largest `logit`, or the `distance` to examples.
        false_alarms: Share of rows like the examples that may be refused, above 0 and below 1.

    Raises:
        ValueError: The other router does not read its input or routes by token; or the score or the share is out of
            range.
    """

    router: RouterSpec | None = None
    score: Literal["energy", "logit", "distance"] = "energy"
    false_alarms: float = 0.05

    scopes: ClassVar[tuple[Scope, ...]] = ("sequence",)
    sums_to_one: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the ranges, and take the place of the other router."""
        object.__setattr__(self, "router", self.inner)
        object.__setattr__(self, "per", self.inner.per)
        super().__post_init__()
        if self.inner.depends_on != "input" or self.inner.scope != "sequence":
            raise ValueError(
                f"Abstain got router={self.inner}; give a router that reads its input and routes by sequence"
            )
        if self.score not in ("energy", "logit", "distance") or not 0 < self.false_alarms < 1:
            raise ValueError(
                f"Abstain got score={self.score!r}, false_alarms={self.false_alarms}; score is energy, logit or "
                "distance, false_alarms above 0 and below 1"
            )

    @property
    def inner(self) -> RouterSpec:
        """The other router."""
        return Softmax(per=self.per) if self.router is None else self.router

    @property
    def fits_from(self) -> frozenset[FitsFrom]:
        """Examples, and what the other router is fitted from."""
        return self.inner.fits_from | {"examples"}

    @property
    def reads(self) -> Reads:  # type: ignore[override]
        """What the other router reads."""
        return self.inner.reads

    @property
    def taught_by_task(self) -> bool:  # type: ignore[override]
        """As the other router."""
        return self.inner.taught_by_task

    @property
    def taught_by_loss(self) -> bool:
        """As the other router."""
        return self.inner.taught_by_loss

    def build(self, dim: int, num_experts: int) -> "AbstainRouter":
        """Build the router of one place."""
        return AbstainRouter(self, self.inner.build(dim, num_experts))


class AbstainRouter(FittedRouter):
    """Takes the weights of another router away from rows that score above a threshold.

    Args:
        spec: How rows are scored.
        inner: The other router.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    state: ClassVar[tuple[str, ...]] = ("threshold", "centres")

    def __init__(self, spec: Abstain, inner: Router) -> None:
        super().__init__()
        self.spec, self.inner = spec, inner

    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Return the shapes of the threshold and of the examples' centres."""
        return {"threshold": (), "centres": (None, None)}

    def fit(self, fitting: Fitting) -> None:
        """Fit the other router, and find the threshold on rows that nothing was fitted to.

        Raises:
            ValueError: There are too few rows, or the other router gives no logits to score by.
        """
        examples = fitting.examples
        held_out = torch.ones_like(examples.experts, dtype=torch.bool)
        if self.spec.score == "distance" or "examples" in self.spec.inner.fits_from:
            held_out = _every_second(examples.experts)
        self.inner.fit(replace(fitting, find_examples=lambda: examples[~held_out]))
        centres = examples.features[:0]
        if self.spec.score == "distance":
            own = examples[~held_out]
            known = sorted(set(own.experts.tolist()))
            means = torch.stack([own.features[own.experts == expert].mean(dim=0) for expert in known])
            centres = functional.normalize(means, dim=-1)
        logits = None
        if self.spec.score != "distance":
            logits = torch.cat([_logits(routing) for routing in fitting.route(self.inner)])[held_out]
        scores = self.scores(examples.features[held_out], logits, centres)
        self.remember(threshold=conformal_quantile(scores, self.spec.false_alarms), centres=centres)

    def scores(self, features: Tensor, logits: Tensor | None, centres: Tensor) -> Tensor:
        """Return how unlike the examples rows are, (B,).

        Args:
            features: (B, D).
            logits: (B, E); None where they do not count.
            centres: Of unit length, (C, D).
        """
        if logits is None:
            return 1 - (functional.normalize(features, dim=-1) @ centres.T).amax(dim=-1)
        return -logits.logsumexp(dim=-1) if self.spec.score == "energy" else -logits.amax(dim=-1)

    def forward(self, context: RoutingContext) -> Routing:
        """Return the other router's weights, all 0 in rows that are refused."""
        threshold, centres = self.found("threshold"), self.found("centres")
        routing: Routing = self.inner(context)
        with torch.no_grad():
            logits = None if self.spec.score == "distance" else _logits(routing)
            kept = self.scores(context.pooled, logits, centres.to(context.pooled)) <= threshold
        return replace(routing, weights=routing.weights * kept[:, None, None, None])

    def adopt(self, other: Router) -> None:
        """Go on with a router that was trained."""
        self.inner.load_state_dict(other.state_dict())

    def make_room(self, stored: Mapping[str, Tensor]) -> None:
        """Take the shapes of what was saved, of the other router too."""
        super().make_room(stored)
        inside = {name.removeprefix("inner."): t for name, t in stored.items() if name.startswith("inner.")}
        self.inner.make_room(inside)

    def grow(self, count: int) -> None:
        """Let the other router grow; what is known of its logits is known no longer."""
        super().grow(count)
        self.inner.grow(count)

    def trim(self, keep: Sequence[int]) -> None:
        """Let the other router keep these experts; what is known of its logits is known no longer."""
        self.forget()
        self.inner.trim(keep)


def conformal_quantile(scores: Tensor, above: float) -> Tensor:
    """Return the threshold that a new score, drawn as these were, exceeds with a probability of at most `above`.

    Args:
        scores: (N,).
        above: The probability; below 1 / (N + 1) no threshold keeps it, and the largest score is returned.

    Raises:
        ValueError: There are no scores.
    """
    if not len(scores):
        raise ValueError("no example is left to calibrate on; give at least two rows of each task")
    rank = min(math.ceil((len(scores) + 1) * (1 - above)), len(scores))
    return scores.sort().values[rank - 1]


def _every_second(experts: Tensor) -> Tensor:
    """Return which rows are the second, fourth ... of their expert, (N,)."""
    same = experts[:, None] == experts[None]
    return same.tril().sum(dim=1) % 2 == 0


def _logits(routing: Routing) -> Tensor:
    """Return logits, (B, E).

    Raises:
        ValueError: There are none.
    """
    if routing.logits is None:
        raise ValueError('the router gives no logits to tell rows apart by; use score="distance"')
    return routing.logits[:, 0, 0]
