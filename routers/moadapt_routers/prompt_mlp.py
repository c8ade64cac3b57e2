"""A global router: each place's weights from the embedded prompt, before any block has run.

As X-LoRA (Buehler and Buehler, 2024, section 2.2), which blends all adapters of every layer by one small network, but
without its second pass: it reads the averaged embeddings of the prompt's text and of the image, not the hidden states
of a pass without adapters.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moadapt.registry import ROUTERS
from moadapt.router import Reads, RoutingContext, Scope
from moadapt.routing import Routing
from moadapt_routers.logit_map import DeepLogitMap, LogitMap
from moadapt_routers.logit_router import LogitRouterSpec


@ROUTERS.register("prompt_mlp")
@dataclass(frozen=True, kw_only=True)
class PromptMLP(LogitRouterSpec):
    """All experts, blended at each place by a network over the prompt's text and image.

    Args:
        width: Of the network's hidden layer, at least 1.

    Raises:
        ValueError: The width is below 1.
    """

    width: int = 64

    scopes: ClassVar[tuple[Scope, ...]] = ("sequence",)
    reads: ClassVar[Reads] = "prompt"

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        if self.width < 1:
            raise ValueError(f"PromptMLP got width={self.width}; it must be at least 1")

    def logit_map(self, dim: int, num_experts: int) -> LogitMap:
        """Build the network."""
        return DeepLogitMap(dim, num_experts, self.width)

    def choose(self, logits: Tensor, context: RoutingContext, *, training: bool) -> Routing:
        """Return dense weights."""
        return Routing(logits.softmax(-1), logits.shape[-1])
