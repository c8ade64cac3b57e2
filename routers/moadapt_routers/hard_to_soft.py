"""Routing that is taught by task first: each row gets its task's expert, later the best k by a learned router.

LoRA-Mixer (2025), hard and soft stages: experts become what their names say before a router chooses among them.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from moadapt.registry import ROUTERS
from moadapt.router import RoutingContext
from moadapt.routing import Routing
from moadapt_routers.top_k import TopK, best_of

_MUCH = 1e4
"""What lifts one logit so far above the others that its weight is exactly 1."""


@ROUTERS.register("hard_to_soft")
@dataclass(frozen=True, kw_only=True)
class HardToSoft(TopK):
    """The expert of a row's task for the first part of training, then the k best; only training needs the task.

    In the first part the router itself gets no gradient from the task loss; the objectives `task_cross_entropy` and
    `load_balance` teach it then. A validation judges the router, in that part too.

    Args:
        hard: Share of the training that goes by task, from 0 to 1.

    Raises:
        ValueError: The share is out of range.
    """

    hard: float = 0.5

    taught_by_task: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        if not 0 <= self.hard <= 1:
            raise ValueError(f"HardToSoft got hard={self.hard}; it must be from 0 to 1")

    def choose(self, logits: Tensor, context: RoutingContext, *, training: bool) -> Routing:
        """Return sparse weights; 1 and zeros in the hard stage."""
        if context.progress is None:
            return best_of(logits, self.k)
        if context.task_ids is None:
            raise ValueError("HardToSoft goes by task while it is trained; pass task=, or train with pass_task")
        own = functional.one_hot(context.task_ids, logits.shape[-1]).reshape(-1, 1, 1, logits.shape[-1])
        return best_of(logits + own * (context.progress < self.hard) * _MUCH, self.k)
