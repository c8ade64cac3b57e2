"""Routing, the value that a router gives; what a router may look at; and the router interface.

Routers and adapter families meet in one frozen value with one shape law, so that any router works with any family.
Axes: B rows, T tokens, H heads of a routing, E experts, K chosen experts, D features.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moadapt.tiles import Tiles, tile

Scope = Literal["sequence", "token"]
Per = Literal["model", "tower", "layer", "site"]
SCOPES: tuple[Scope, ...] = ("sequence", "token")
PER: tuple[Per, ...] = ("model", "tower", "layer", "site")


@dataclass(frozen=True)
class Routing:
    """How much each expert counts, for every input of a call.

    Args:
        weights: (B|1, T|1, H|1, E), an axis being 1 where the routing does not depend on it; with `indices`, the last
            axis is K.
        num_experts: E.
        indices: Which experts the K weights belong to, same shape as `weights`.
        combines: Whether weights blend adapter outputs or adapter parameters.
        logits: What the weights were made of, (B|1, T|1, H|1, E), for objectives.
        log_prob: Log-probability of sampled choices, (B|1, T|1, H|1).

    Raises:
        ValueError: The shapes break the law above, or the weights are no floating-point numbers.

    Example:
        >>> Routing.of_rows(torch.tensor([2, 0]), num_experts=3).dense().squeeze()
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """

    weights: Tensor
    num_experts: int
    indices: Tensor | None = None
    combines: Literal["outputs", "parameters"] = "outputs"
    logits: Tensor | None = None
    log_prob: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the shape law and the number type."""
        shape = tuple(self.weights.shape)
        if not self.weights.is_floating_point():
            raise ValueError(
                f"routing weights are {self.weights.dtype} of shape {shape}, in which scales would be cut to whole "
                "numbers; give floating-point weights, such as weights.float()"
            )
        if len(shape) != 4 or (self.indices is None and shape[3] != self.num_experts):
            raise ValueError(
                f"routing weights have shape {shape}; expected (B|1, T|1, H|1, {self.num_experts}), or "
                "(B|1, T|1, H|1, K) together with indices"
            )
        if self.indices is not None and tuple(self.indices.shape) != shape:
            raise ValueError(f"routing indices have shape {tuple(self.indices.shape)}, but the weights have {shape}")

    @classmethod
    def constant(cls, weights: Tensor) -> "Routing":
        """Route every input alike.

        Args:
            weights: (E,).
        """
        return cls(weights.reshape(1, 1, 1, -1), num_experts=weights.numel())

    @classmethod
    def of_rows(cls, experts: Tensor, num_experts: int) -> "Routing":
        """Give each row one expert with weight 1.

        Args:
            experts: Index of each row's expert, (B,).
            num_experts: E.
        """
        indices = experts.reshape(-1, 1, 1, 1)
        return cls(torch.ones(indices.shape, device=experts.device), num_experts, indices)

    @property
    def per_row(self) -> bool:
        """Whether rows may differ."""
        return self.weights.shape[0] != 1

    @property
    def per_token(self) -> bool:
        """Whether tokens may differ."""
        return self.weights.shape[1] != 1

    def dense(self) -> Tensor:
        """Return the weights of all experts, (B|1, T|1, H|1, E)."""
        if self.indices is None:
            return self.weights
        full = self.weights.new_zeros(*self.weights.shape[:3], self.num_experts)
        return full.scatter_add(3, self.indices, self.weights)

    @cached_property
    def tiles(self) -> Tiles:
        """The tokens of a sparse routing without heads, sorted into tiles by the experts they chose."""
        assert self.indices is not None, "a dense routing chooses none"
        return tile(self.indices.flatten(0, 2), self.num_experts)

    def used(self) -> tuple[bool, ...]:
        """Tell of each expert whether any input uses it; one transfer from the device, then remembered.

        An expert counts as used where its weight is a zero that may be trained away, and while code is compiled.
        """
        sparse = self.indices is not None
        if torch.compiler.is_compiling() or (not sparse and self.weights.requires_grad):
            return (True,) * self.num_experts
        return self._used

    @cached_property
    def _used(self) -> tuple[bool, ...]:
        if self.indices is None:
            return tuple((self.weights.detach() != 0).flatten(0, 2).any(dim=0).tolist())
        chosen = set(torch.unique(self.indices).tolist())
        return tuple(expert in chosen for expert in range(self.num_experts))

    def repeat_rows(self, times: int) -> "Routing":
        """Return the routing of rows that are each repeated, as beam search does."""
        if times == 1 or not self.per_row:
            return self
        parts = {name: getattr(self, name) for name in ("weights", "indices", "logits", "log_prob")}
        return replace(self, **{n: t.repeat_interleave(times, dim=0) for n, t in parts.items() if t is not None})

    def detached(self) -> "Routing":
        """Return the same routing cut off from the graph, without logits."""
        return replace(self, weights=self.weights.detach(), logits=None, log_prob=None)


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
