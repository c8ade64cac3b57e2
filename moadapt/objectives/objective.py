"""The objective interface: a spec that gives one number, which training makes small beside the loss of the answers."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from moadapt.mixture import Mixture


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """What a user writes to choose an objective: a value bound by YAML.

    Args:
        weight: What its value is multiplied by before it joins the loss, 0 or more.

    Raises:
        ValueError: The weight is negative.
    """

    weight: float = 0.1

    reads: ClassVar[str] = "parameters"
    """What its value depends on. What depends on parameters alone is the same on every process and in every batch of a
    step, so training adds its gradient once a step; it takes no others."""

    def __post_init__(self) -> None:
        """Check the weight."""
        if self.weight < 0:
            raise ValueError(f"{type(self).__name__} got weight={self.weight}; give 0 or more")

    @abstractmethod
    def value(self, mixture: "Mixture") -> Tensor:
        """Return the number to make small, not weighted, as a scalar through which gradients reach the adapters.

        Args:
            mixture: The mixture in training.
        """
