"""Between proportional and uniform: a task of N rows gets a share in proportion to N^(1/T).

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", section 3.5.2.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moadapt.registry import SAMPLERS
from moadapt.sampling.sampler import Known, Sampler


@SAMPLERS.register("temperature")
@dataclass(frozen=True, kw_only=True)
class Temperature(Sampler):
    """Shares in proportion to rows^(1/T): small tasks get more than their rows, large ones less.

    Args:
        temperature: T, at least 1; 1 is proportional, 2 takes the square root, `.inf` is uniform.

    Raises:
        ValueError: The temperature is below 1.
    """

    temperature: float = 2.0

    def __post_init__(self) -> None:
        """Check the temperature."""
        check_temperature("temperature", self.temperature)

    def shares(self, sizes: Mapping[str, int], step: int, known: Known) -> Mapping[str, float]:
        """Return powers of the sizes."""
        return {name: size ** (1 / self.temperature) for name, size in sizes.items()}


def check_temperature(name: str, temperature: float) -> None:
    """Refuse a temperature below 1.

    Args:
        name: What the setting is called.
        temperature: Its value.

    Raises:
        ValueError: It is below 1, or no number.
    """
    if not temperature >= 1:
        raise ValueError(f"{name} is {temperature}; give at least 1, which is proportional, up to .inf, which is equal")
