"""Routing among experts that each serve a kind of content: what an input has nothing of gets no weight.

After the condition-aware routing of CARE-Edit (2025), made for image editing: experts have types, those whose
condition is absent are masked, general ones keep a share. Here
`w = f softmax_general(l / tau) + (1 - f) softmax_present(l / tau)` with f the floor; tau may fall while training goes
on (`end_temperature`), from soft towards one-hot. Axes: B rows, T tokens, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from moadapt.registry import ROUTERS
from moadapt.router import RoutingContext
from moadapt.routing import Routing
from moadapt_routers.logit_router import LogitRouter, LogitRouterSpec

ExpertType = Literal["any", "image", "text", "image_rows"]
TYPES: tuple[ExpertType, ...] = get_args(ExpertType)


@ROUTERS.register("typed")
@dataclass(frozen=True, kw_only=True)
class Typed(LogitRouterSpec):
    """A softmax over the experts whose type an input has; where there is none, only the shared adapter acts.

    By token, experts of type `image` serve image tokens, `text` all others, `image_rows` what stands at or behind the
    first image token of the prompt; by sequence, the first and the last serve rows with an image, `text` serves all.

    Args:
        types: For each expert, in order, `any`, `image`, `text` or `image_rows`; experts without one are `any`.
        floor: Share that experts of type `any` have together at least, from 0 to 1, wherever one of them is available.

    Raises:
        ValueError: A type is unknown or the floor is out of range; at build, there are more types than experts, or a
            floor and no expert of type `any`.
    """

    types: tuple[ExpertType, ...] = ()
    floor: float = 0.0

    def __post_init__(self) -> None:
        """Check types and range."""
        super().__post_init__()
        unknown = [each for each in self.types if each not in TYPES]
        if unknown or not 0 <= self.floor <= 1:
            raise ValueError(
                f"Typed got types={self.types}, floor={self.floor}; types are {', '.join(TYPES)}, the floor from 0 to 1"
            )

    def build(self, dim: int, num_experts: int) -> LogitRouter:
        """Build the router of one place."""
        if len(self.types) > num_experts:
            raise ValueError(f"Typed got {len(self.types)} types for {num_experts} experts; give one an expert at most")
        if self.floor and "any" not in self._all(num_experts):
            raise ValueError(f"Typed got floor={self.floor}, but no expert of type any to have it; add one, or drop it")
        return super().build(dim, num_experts)

    def kept(self, keep: Sequence[int]) -> "Typed":
        """Return the types of these experts."""
        types = self._all(max(keep, default=0) + 1)
        return replace(self, types=tuple(types[expert] for expert in keep))

    @property
    def tells_images(self) -> bool:
        """Whether some expert is not of type `any`."""
        return any(each != "any" for each in self.types)

    def choose(self, logits: Tensor, context: RoutingContext, *, training: bool) -> Routing:
        """Return dense weights, exactly 0 for experts whose type is absent."""
        types = self._all(logits.shape[-1])
        present = self._present(types, logits, context) & ~logits.isneginf()
        weights = _softmax_over(present, logits)
        if self.floor:
            general = present & torch.tensor([each == "any" for each in types], device=logits.device)
            floored = self.floor * _softmax_over(general, logits) + (1 - self.floor) * weights
            weights = torch.where(general.any(-1, keepdim=True), floored, weights)
        return Routing(weights, logits.shape[-1])

    def _all(self, num_experts: int) -> tuple[ExpertType, ...]:
        others: list[ExpertType] = ["any"] * (num_experts - len(self.types))
        return (*self.types, *others)

    def _present(self, types: Sequence[ExpertType], logits: Tensor, context: RoutingContext) -> Tensor:
        """Tell which experts serve what there is, (B, T, 1, E)."""
        if not self.tells_images:
            return torch.ones_like(logits, dtype=torch.bool)
        served = _served_by_token(context, logits) if self.scope == "token" else _served_by_row(context, logits)
        return torch.stack([served[each].expand(logits.shape[:2]) for each in types], dim=-1).unsqueeze(2)


def _served_by_row(context: RoutingContext, logits: Tensor) -> dict[ExpertType, Tensor]:
    """Tell what rows have, (B, 1) each."""
    every = torch.ones(len(logits), 1, dtype=torch.bool, device=logits.device)
    pictured = every if context.tower != "language" else ~every
    if context.with_image is not None:
        pictured = context.with_image.unsqueeze(1)
    return {"any": every, "text": every, "image": pictured, "image_rows": pictured}


def _served_by_token(context: RoutingContext, logits: Tensor) -> dict[ExpertType, Tensor]:
    """Tell what tokens are, (B, T) each; no token knows of an image that stands behind it."""
    every = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    if context.tower != "language":
        return {"any": every, "text": ~every, "image": every, "image_rows": every}
    if context.real is None:
        raise ValueError("Typed tells image tokens from text, which a site here does not; leave experts out there")
    image = ~every if context.image is None else context.image
    if context.with_image is None or context.prompt is not None:
        prompt = every if context.prompt is None else context.prompt
        behind = (image & prompt).cumsum(dim=1) > 0
    else:  # a cache is continued
        behind = context.with_image.unsqueeze(1) & every
    return {"any": every, "text": ~image, "image": image, "image_rows": behind}


def _softmax_over(members: Tensor, logits: Tensor) -> Tensor:
    """Return a softmax over members alone, zeros where there are none."""
    lowest = torch.finfo(logits.dtype).min
    return logits.masked_fill(~members, lowest).softmax(-1) * members
