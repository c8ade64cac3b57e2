"""Routing, the value that a router gives.

Routers and adapter families meet in one frozen value with one shape law, so that any router works with any family.
Axes: B rows, T tokens, H heads of a routing, E experts, K chosen experts.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from moadapt.tiles import Tiles, tile

Combines = Literal["outputs", "parameters"]


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
    combines: Combines = "outputs"
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

    def of_entries(self, rows: Tensor, *, along_tokens: bool) -> "Routing":
        """Return the routing of what belongs to rows, such as their images, where tokens do not differ.

        Args:
            rows: Row of each entry, (N,).
            along_tokens: Whether the entries lie in the axis of tokens, and not in that of rows.
        """
        parts = {name: getattr(self, name) for name in ("weights", "indices")}
        found = {name: tensor[rows] for name, tensor in parts.items() if tensor is not None}
        if along_tokens:
            found = {name: tensor.transpose(0, 1) for name, tensor in found.items()}
        return replace(self, **found, logits=None, log_prob=None)

    def followed_by(self, other: "Routing") -> "Routing":
        """Return the routing of these experts and, numbered behind them, those of another routing.

        Args:
            other: Without weights by head.
        """
        of_ours, of_theirs = self._numbered(), other._numbered() + self.num_experts
        axes = [max(sizes) for sizes in zip(self.weights.shape[:3], other.weights.shape[:3], strict=True)]
        weights = [self.weights.expand(*axes, -1), other.weights.to(self.weights).expand(*axes, -1)]
        indices = [of_ours.expand(*axes, -1), of_theirs.expand(*axes, -1)]
        return Routing(torch.cat(weights, dim=3), self.num_experts + other.num_experts, torch.cat(indices, dim=3))

    def _numbered(self) -> Tensor:
        """Return which expert each weight belongs to, shaped as the weights."""
        if self.indices is not None:
            return self.indices
        return torch.arange(self.num_experts, device=self.weights.device).expand(self.weights.shape)

    def judged_by(self, logits: Tensor) -> "Routing":
        """Return the same routing with the logits that objectives judge it by.

        Args:
            logits: (B|1, T|1, H|1, E).
        """
        return replace(self, logits=logits)

    def detached(self) -> "Routing":
        """Return the same routing cut off from the graph, without logits."""
        return replace(self, weights=self.weights.detach(), logits=None, log_prob=None)
