"""The interface of initial states: where the factors of a LoRA begin.

A start `s B0 A0` that is not zero, such as a part of the frozen weight, is taken off again by a second term that never
trains, so that the base stays as it is and several such adapters sit on it: `s (B A - B0 A0)`. It is computed as
`s ((B - B0) A + B0 (A - A0))`, which is exactly zero at the start, of any number type.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """The linear layer that an adapter starts at.

    Args:
        in_features: D.
        out_features: F.
        rank: r of the adapter.
        scale: Its factor s.
        device: Where factors are made.
        weight: Gives the frozen weight, (F, D), in float32 or finer.
        inputs: Mean of the outer products of the layer's inputs, (D, D); None for starts that read none.
        known: What was found before; adapters that are built together share it.
    """

    in_features: int
    out_features: int
    rank: int
    scale: float
    device: torch.device
    weight: Callable[[], Tensor]
    inputs: Tensor | None = None
    known: dict[type, tuple[Tensor, ...]] = field(default_factory=dict)

    def once(self, initial: "Initial", find: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return what a start finds in this weight and these inputs, the same for every adapter of the layer.

        Args:
            initial: Which start.
            find: Finds it.
        """
        if type(initial) not in self.known:
            self.known[type(initial)] = find()
        return self.known[type(initial)]


class Initial(ABC):
    """Where the factors of a low-rank adapter begin."""

    shifts: ClassVar[bool] = False
    """Whether `up^T down` is not zero at first, so that a frozen term takes it off again."""
    reads_inputs: ClassVar[bool] = False
    """Whether it needs `Layer.inputs`."""

    @abstractmethod
    def factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return `down (r, D)` and `up (r, F)`.

        Args:
            layer: Where.

        Raises:
            ValueError: The rank suits neither the layer nor the method; the message says which would.
        """


_LATER: ContextVar[bool] = ContextVar("_LATER", default=False)


@contextmanager
def filled_later() -> Iterator[None]:
    """Build adapters whose tensors are copied in afterwards: none looks for its start within the `with` block."""
    token = _LATER.set(True)
    try:
        yield
    finally:
        _LATER.reset(token)


def is_filled_later() -> bool:
    """Tell whether adapters that are built now get their tensors afterwards."""
    return _LATER.get()


def check_rank(layer: Layer, most: int) -> None:
    """Refuse a rank above what a decomposition gives.

    Args:
        layer: Where.
        most: The highest rank.

    Raises:
        ValueError: The rank is higher.
    """
    if layer.rank > most:
        raise ValueError(
            f"rank {layer.rank} is above {most}, all that a layer from {layer.in_features} to {layer.out_features} "
            "features has to start from; give a lower rank"
        )
