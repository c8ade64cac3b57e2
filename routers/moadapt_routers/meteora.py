"""Token routing over adapters at every single site: a gate without bias, the best k, a softmax over them.

Xu et al., "MeteoRA: Multiple-tasks Embedded LoRA for Large Language Models", section 3.2. The gates learn from the
objective `task_cross_entropy` beside the answers.
"""

from dataclasses import dataclass
from typing import ClassVar

from moadapt.registry import ROUTERS
from moadapt.router import Per, Scope
from moadapt_routers.logit_map import LogitMap
from moadapt_routers.top_k import TopK


@ROUTERS.register("meteora")
@dataclass(frozen=True, kw_only=True)
class MeteoRA(TopK):
    """The k best experts of each token at each site, by gates without bias."""

    scope: Scope = "token"
    per: Per = "site"

    scopes: ClassVar[tuple[Scope, ...]] = ("token",)

    def logit_map(self, dim: int, num_experts: int) -> LogitMap:
        """Build the gate."""
        return LogitMap(dim, num_experts, bias=False)
