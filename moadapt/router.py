"""The router interface: what a user writes, what is built from it, and what it may look at.

Axes: B rows, T tokens, E experts, D features.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moadapt.routing import Routing

Scope = Literal["sequence", "token"]
Per = Literal["model", "tower", "layer", "site"]
SCOPES: tuple[Scope, ...] = ("sequence", "token")
PER: tuple[Per, ...] = ("model", "tower", "layer", "site")


@dataclass(frozen=True)
class RoutingContext:
    """What a router may look at, at its place.

    Args:
        hidden: Hidden states entering the place, (B, T, D).
        prompt: Which tokens are prompt, True or False, (B, T); None where all are (vision towers).
        image: Which tokens stand for image patches, (B, T); None where there is no such difference.
        task_ids: Index of each row's task, (B,).
        available: Which experts may be chosen, (E,).
    """

    hidden: Tensor | None = None
    prompt: Tensor | None = None
    image: Tensor | None = None
    task_ids: Tensor | None = None
    available: Tensor | None = None

    def pooled(self) -> Tensor:
        """Return one feature vector a row, (B, D), from prompt tokens only.

        Tokens are normalised, averaged over the prompt's text and over its image tokens, and the two averages are
        averaged, so that a short question is not drowned by many patches.
        """
        tokens = self.tokens()
        if self.prompt is None:
            return tokens.mean(dim=1)
        kinds = [self.prompt] if self.image is None else [self.prompt & ~self.image, self.prompt & self.image]
        shares = torch.stack([kind.to(tokens.dtype) for kind in kinds], dim=1)  # (B, kinds, T)
        shares = shares / shares.sum(dim=2, keepdim=True).clamp(min=1)
        filled = shares.sum(dim=(1, 2), keepdim=True).round().clamp(min=1)  # how many kinds a row has
        with torch.autocast(tokens.device.type, enabled=False):
            return (shares.sum(dim=1, keepdim=True) / filled @ tokens).squeeze(1)

    def tokens(self) -> Tensor:
        """Return the normalised hidden states in float32, (B, T, D)."""
        assert self.hidden is not None, "the place gives its routers hidden states"
        return functional.layer_norm(self.hidden.float(), (self.hidden.shape[-1],))


class Router(nn.Module, ABC):
    """Gives each input its weights."""

    needs: ClassVar[frozenset[str]]
    """Fields of `RoutingContext` it reads: `hidden`, `task_ids`."""

    @abstractmethod
    def forward(self, context: RoutingContext) -> Routing:
        """Route the inputs of one call.

        Args:
            context: What is known at the router's place.
        """

    @abstractmethod
    def grow(self, count: int) -> None:
        """Make room for `count` more experts at the end; the old ones' parameters keep their bits."""

    @abstractmethod
    def trim(self, keep: Sequence[int]) -> None:
        """Keep only these experts, in this order."""


@dataclass(frozen=True, kw_only=True)
class RouterSpec(ABC):
    """What a user writes to choose a router: a value bound by YAML and saved as JSON.

    Args:
        scope: Whether a whole sequence or each token is routed.
        per: How many routers there are: one a model, tower, layer or site.

    Raises:
        ValueError: The class does not support the scope, or the place is unknown.
    """

    scope: Scope = "sequence"
    per: Per = "layer"

    scopes: ClassVar[tuple[Scope, ...]] = SCOPES
    depends_on: ClassVar[Literal["nothing", "task", "input"]] = "input"

    def __post_init__(self) -> None:
        """Check scope and place."""
        name = type(self).__name__
        if self.scope not in self.scopes:
            raise ValueError(f"{name} routes by {' or '.join(self.scopes)}, not by {self.scope!r}; change scope")
        if self.per not in PER:
            raise ValueError(f"{name} got per={self.per!r}; choose one of {', '.join(PER)}")

    @abstractmethod
    def build(self, dim: int, num_experts: int) -> Router:
        """Build the router of one place.

        Args:
            dim: Width of the hidden states there, D.
            num_experts: E.
        """


def mask_unavailable(logits: Tensor, available: Tensor | None) -> Tensor:
    """Set the logits of unavailable experts to minus infinity.

    Args:
        logits: (..., E).
        available: True where an expert may be chosen, (E,).
    """
    return logits if available is None else logits.masked_fill(~available, float("-inf"))
