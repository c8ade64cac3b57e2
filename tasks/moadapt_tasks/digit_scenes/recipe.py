"""The numbers of the recipe that makes the digit-scene base."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PretrainSettings:
    """The numbers of the recipe."""

    patch_steps: int = 4000
    """Steps on patches only."""
    list_steps: int = 6000
    """Steps on listings whose prompts name no object."""
    lookup_steps: int = 6500
    """Steps on all listings."""
    batch_size: int = 64
    """Scenes a step."""
    scenes: int = 60_000
    """Distinct scenes drawn."""
    learning_rate: float = 2e-3
    """Peak of each phase's warm-up and cosine, for matrices; embeddings, heads and vectors get half of it."""
    patch_weight: float = 0.2
    """Weight of the patch loss beside the listing loss."""
    begun_weight: float = 5.0
    """Weight of the distance of boxes, when their brackets open, beside the listing loss."""
    seed: int = 0
    """Seed of weights, scenes and order."""

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.patch_steps + self.list_steps + self.lookup_steps
