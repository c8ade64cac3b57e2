"""Routing by a classifier of the prompt: one expert set, switched on as a whole, or none where it is not sure.

After scenario-specific adapter sets of audio-visual speech recognition, one for each class of noise: a small network
names the scenario, and the base alone serves what fits none.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moadapt.registry import ROUTERS
from moadapt.router import Per, Reads, RoutingContext, Scope
from moadapt.routing import Routing
from moadapt_routers.logit_map import DeepLogitMap, LogitMap
from moadapt_routers.logit_router import LogitRouterSpec


@ROUTERS.register("scenario")
@dataclass(frozen=True, kw_only=True)
class Scenario(LogitRouterSpec):
    """The expert that a classifier of text and image names, with weight 1; below a confidence none.

    The task loss gives the classifier no gradient: train it with the objective `task_cross_entropy`.

    Args:
        confidence: Least probability of the named expert, from 0 to 1; below it only the shared adapter acts.
        width: Of the classifier's hidden layer, at least 1.

    Raises:
        ValueError: The confidence or the width is out of range.
    """

    per: Per = "model"
    confidence: float = 0.0
    width: int = 64

    scopes: ClassVar[tuple[Scope, ...]] = ("sequence",)
    reads: ClassVar[Reads] = "prompt"

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not 0 <= self.confidence <= 1 or self.width < 1:
            raise ValueError(
                f"Scenario got confidence={self.confidence}, width={self.width}; confidence is from 0 to 1, width at "
                "least 1"
            )

    @property
    def taught_by_loss(self) -> bool:
        """False, as weights are 1 or 0."""
        return False

    def logit_map(self, dim: int, num_experts: int) -> LogitMap:
        """Build the classifier."""
        return DeepLogitMap(dim, num_experts, self.width)

    def choose(self, logits: Tensor, context: RoutingContext, *, training: bool) -> Routing:
        """Return one index an input, (B, 1, 1, 1), of weight 1 or 0."""
        probability, indices = logits.detach().softmax(-1).max(dim=-1, keepdim=True)
        return Routing((probability >= self.confidence).to(logits.dtype), logits.shape[-1], indices)
