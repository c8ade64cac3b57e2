"""The family interface: a spec a user writes, the bank it becomes at a site, and the delta it merges to."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moadapt.routing import Routing
from moadapt.sites import Placement, Site


class NotMergeable(ValueError):
    """The adapters of a bank are no affine map of the site's input, so no weight can hold them."""


@dataclass(frozen=True)
class Delta:
    """What a bank adds at a site under fixed weights, as an affine map of the site's input.

    Args:
        down: (R, D).
        up: (R, F); the low-rank part is `up^T down`, (F, D).
        dense: A part without low-rank form, (F, D).
        bias: (F,).
    """

    down: Tensor
    up: Tensor
    dense: Tensor | None = None
    bias: Tensor | None = None

    def weight(self) -> Tensor:
        """Return the whole weight change, (F, D), in float32 or finer."""
        exact = torch.promote_types(self.down.dtype, torch.float32)
        product = self.up.to(exact).T @ self.down.to(exact)
        return product if self.dense is None else product + self.dense.to(exact)


@dataclass(frozen=True)
class Adapter:
    """One adapter of a mixture, as a bank sees it.

    Args:
        name: Its name.
        spec: What the user wrote.
        expert: Its index among the experts; None for the shared adapter.
    """

    name: str
    spec: "FamilySpec"
    expert: int | None


class Bank(nn.Module, ABC):
    """All adapters of one family at one site."""

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor, routing: Routing | None) -> Tensor:
        """Return what the adapters add to the base's output.

        Args:
            x: Input of the site, (B, T, D) or (N, D).
            y: The frozen base's output there, (B, T, F) or (N, F).
            routing: Weights of the experts; None where there are none.

        Returns:
            The delta, shaped as `y`.
        """

    def add_to(self, y: Tensor, x: Tensor, routing: Routing | None) -> Tensor:
        """Add the delta to a fresh output, in place where the family can.

        Args:
            y: Fresh output of the base, which the caller gives up.
            x: Input of the site.
            routing: Weights of the experts.
        """
        delta: Tensor = self(x, y, routing)
        return y + delta

    def adapt(self, module: nn.Module, x: Tensor, routing: Routing | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base's module and add the delta, in one step where the family can.

        Args:
            module: The frozen module of the site.
            x: Its input.
            routing: Weights of the experts.
            args: What else the module takes.
            kwargs: What else the module takes, by name.
        """
        return self.add_to(module(x, *args, **kwargs), x, routing)

    @abstractmethod
    def delta(self, weights: Tensor) -> Delta:
        """Return the affine map under fixed weights.

        Args:
            weights: Weight of every expert, (E,); the shared adapter counts once.

        Raises:
            NotMergeable: The family is no affine map; the message says why.
        """

    @abstractmethod
    def state(self, name: str) -> dict[str, Tensor]:
        """Return an adapter's tensors by name, detached."""

    @abstractmethod
    def load_state(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy an adapter's tensors in.

        Raises:
            ValueError: Names or shapes differ; both sides are said.
        """

    @abstractmethod
    def grow(self, adapter: Adapter) -> None:
        """Add one adapter; the old ones keep their bits. Only between fits."""

    @abstractmethod
    def trim(self, keep: Sequence[str]) -> None:
        """Keep the shared adapter and these experts, renumbered in this order. Only between fits."""

    @abstractmethod
    def freeze(self, name: str) -> None:
        """Move an adapter to the frozen stack, where no optimiser reaches it. Only between fits."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the adapters here."""

    @abstractmethod
    def expert_rows(self) -> dict[str, Tensor]:
        """Return, for each trained parameter that stacks experts, the expert of every row, (R,)."""


@dataclass(frozen=True, kw_only=True)
class FamilySpec(ABC):
    """What a user writes to choose a family: a value bound by YAML and saved as JSON.

    Args:
        placement: Where the adapter sits; None is the mixture's placement.
    """

    placement: Placement | None = None

    mergeable: ClassVar[bool] = True
    """Whether `Bank.delta` exists."""
    identity: ClassVar[bool] = True
    """Whether a fresh adapter changes nothing."""

    @classmethod
    @abstractmethod
    def bank(cls, site: Site, adapters: Sequence[Adapter]) -> Bank:
        """Build the bank of a site.

        Args:
            site: Where.
            adapters: The adapters of this family there, the shared one first.
        """
