"""Routing by task through embeddings of low rank: what tasks have in common is learned once.

A task's logits are `u_t v_e^T`, with an embedding u of each task and v of each expert, so that many tasks over many
experts cost `k (tasks + E)` numbers a place instead of `tasks E`. After the low-rank factorisation of Poly's allocation
matrix (Ponti et al., "Combining Modular Skills in Multitask Learning").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moadapt.registry import ROUTERS
from moadapt.router import RoutingContext
from moadapt.routing import Routing
from moadapt_routers.task_router import TaskRouter, TaskRouterSpec, grown

_START = 0.1


@ROUTERS.register("task_embedding")
@dataclass(frozen=True, kw_only=True)
class TaskEmbedding(TaskRouterSpec):
    """Each task blends all experts by a softmax over products of embeddings; merges exactly per task.

    Args:
        size: Of the embeddings, at least 1.

    Raises:
        ValueError: The size is below 1.
    """

    size: int = 4

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        if self.size < 1:
            raise ValueError(f"TaskEmbedding got size={self.size}; it must be at least 1")

    def build(self, dim: int, num_experts: int) -> "TaskEmbeddingRouter":
        """Build the router of one place; `dim` is not used."""
        return TaskEmbeddingRouter(len(self.tasks) or num_experts, self.size, num_experts, owned=not self.tasks)


class TaskEmbeddingRouter(TaskRouter):
    """Embeddings of tasks and experts.

    Args:
        num_tasks: How many tasks.
        size: Of an embedding.
        num_experts: E.
        owned: Whether tasks come and go with experts.
    """

    def __init__(self, num_tasks: int, size: int, num_experts: int, *, owned: bool) -> None:
        super().__init__(num_experts, owned=owned)
        self.task = nn.Parameter(torch.empty(num_tasks, size).uniform_(-_START, _START))
        self.expert = nn.Parameter(torch.empty(num_experts, size).uniform_(-_START, _START))

    def logits(self) -> Tensor:
        """Return the products, (tasks, 1, E)."""
        with torch.autocast(self.task.device.type, enabled=False):
            return (self.task.float() @ self.expert.float().T).unsqueeze(1)

    def forward(self, context: RoutingContext) -> Routing:
        """Return dense weights, (B, 1, 1, E)."""
        return self.of_tasks(self.logits(), context)

    def grow(self, count: int) -> None:
        """Add experts, and tasks where each is one's own, with small embeddings."""
        self.expert = grown(self.expert, count, 0, _START)
        self.task = grown(self.task, count if self.owned else 0, 0, _START)
        self.num_experts += count

    def trim(self, keep: Sequence[int]) -> None:
        """Keep these experts, and their tasks where each is one's own."""
        self.expert = nn.Parameter(self.expert.detach()[list(keep)].clone())
        if self.owned:
            self.task = nn.Parameter(self.task.detach()[list(keep)].clone())
        self.num_experts = len(keep)
