"""A temperature that moves while training goes on.

Stickland and Murray, "BERT and PALs" (2019), annealed sampling: shares in proportion to N^a, with a from 1 at the
start to 0.2 at the end, so that rows are not wasted at first and tasks are equal when it ends. Here a = 1/T moves
evenly, from any temperature to any other, over a given number of batches; theirs moves epoch by epoch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moadapt.registry import SAMPLERS
from moadapt.sampling.sampler import Known, Sampler
from moadapt.sampling.temperature import check_temperature


@SAMPLERS.register("annealed")
@dataclass(frozen=True, kw_only=True)
class Annealed(Sampler):
    """Shares in proportion to rows^(1/T), with 1/T moving evenly from one temperature to another.

    Args:
        start: T of the first batch, at least 1; 1 is proportional, `.inf` is uniform.
        end: T from batch `steps` on.
        steps: Batches from the one to the other, at least 1; mostly all batches of the training.

    Raises:
        ValueError: A number is out of range.
    """

    start: float = 1.0
    end: float = 5.0
    steps: int = 10_000

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_temperature("start", self.start)
        check_temperature("end", self.end)
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; give at least 1, mostly the number of batches of the training")

    def shares(self, sizes: Mapping[str, int], step: int, known: Known) -> Mapping[str, float]:
        """Return powers of the sizes, the power following the step."""
        moved = min(1.0, step / self.steps)
        power = (1 - moved) / self.start + moved / self.end
        return {name: size**power for name, size in sizes.items()}
