"""Cross-entropy of the routers' logits with the expert that bears a task's name: routing taught by label.

Xu et al., "MeteoRA", section 3.3. What routers cannot learn from the loss of the answers, as where one chosen expert
has weight 1 whatever its logit, they learn from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from moadapt.objectives.objective import RoutingObjective
from moadapt.registry import OBJECTIVES
from moadapt.routed import Routed

if TYPE_CHECKING:
    from moadapt.mixture import Mixture


@OBJECTIVES.register("task_cross_entropy")
@dataclass(frozen=True, kw_only=True)
class TaskCrossEntropy(RoutingObjective):
    """Mean cross-entropy, in nats, over inputs whose task has an expert of its name."""

    counts_answers: ClassVar[bool] = True  # they are routed in generation, where nothing else may have taught it

    def check(self, mixture: "Mixture", tasks: Sequence[str]) -> None:
        """Refuse a mixture in which no expert bears a task's name.

        Raises:
            ValueError: It is so.
        """
        super().check(mixture, tasks)
        if not set(tasks) & set(mixture.experts):
            raise ValueError(
                "TaskCrossEntropy teaches experts named after tasks, and none of "
                f"{', '.join(mixture.experts)} is one of {', '.join(tasks)}; rename the experts, or leave it out"
            )

    def sums(self, routed: Routed) -> Tensor:
        """Return the cross-entropies and the number of inputs that count, (2,)."""
        logits, tasks = routed.logits, routed.tasks
        if logits is None or tasks is None:
            what = "routers that give logits" if logits is None else "the task of every row"
            raise ValueError(f"TaskCrossEntropy needs {what}; choose another router or objective, or pass the tasks")
        own = routed.task_experts[tasks.clamp(min=0)].masked_fill(tasks < 0, -1)
        losses = functional.cross_entropy(logits, own, ignore_index=-1, reduction="none")
        return torch.stack([routed.total(losses), routed.total((own >= 0).to(losses))])

    def value(self, sums: Tensor, routed: Routed) -> Tensor:
        """Return the mean."""
        return sums[0] / sums[1].clamp(min=1)
