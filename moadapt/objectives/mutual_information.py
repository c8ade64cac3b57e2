"""Mutual information: what an input, or its task, tells about the expert.

With p(e | x) an input's probabilities and p(e) their mean, `I(input; expert) = H(E p) - E H(p)`: high where each input
is sure of its expert and the experts are used alike. With p(e | t) the mean over the inputs of task t,
`I(task; expert) = H(p(e)) - sum_t p(t) H(p(e | t))`: high where tasks go to experts of their own, as Chen et al.,
"Mod-Squad: Designing Mixture of Experts As Modular Multi-Task Learners", ask for. Both lie in 0 to ln E.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from moadapt.objectives.objective import RoutingObjective
from moadapt.registry import OBJECTIVES
from moadapt.routed import Routed, entropy, information

if TYPE_CHECKING:
    from moadapt.mixture import Mixture

Of = Literal["task", "input"]


@OBJECTIVES.register("mutual_information")
@dataclass(frozen=True, kw_only=True)
class MutualInformation(RoutingObjective):
    """Experts that specialise: minus the mutual information of task, or input, and expert, down to -ln E.

    Args:
        weight: What the value is multiplied by before it joins the loss, 0 or more.
        of: Whether experts specialise on tasks (`task`, of which there must be two) or on whatever tells inputs apart
            (`input`).

    Raises:
        ValueError: `of` is unknown.
    """

    of: Of = "task"

    def __post_init__(self) -> None:
        """Check what it is the information of."""
        super().__post_init__()
        if self.of not in ("task", "input"):
            raise ValueError(f"MutualInformation got of={self.of!r}; choose task or input")

    def sums(self, routed: Routed) -> Tensor:
        """Return the probabilities by task and expert, (tasks * E,); of inputs, by expert, entropies, count, (E + 2,).

        Raises:
            ValueError: The tasks of the inputs are not known.
        """
        if self.of == "task":
            if routed.tasks is None:
                raise ValueError(
                    "MutualInformation needs the task of each routed row, and here rows are no rows of the batch, but "
                    "tiles of images; give of: input, or leave experts out of the vision tower"
                )
            return routed.total_by_task(routed.probabilities).flatten()
        mean = routed.total(routed.probabilities)
        return torch.cat([mean, routed.total(routed.entropy).reshape(1), routed.count.reshape(1)])

    def value(self, sums: Tensor, routed: Routed) -> Tensor:
        """Return minus the mutual information, in nats."""
        if self.of == "task":
            return -information(sums.view(routed.num_tasks, routed.num_experts))
        count = sums[-1].clamp(min=1)
        return sums[-2] / count - entropy(sums[:-2] / count)

    def check(self, mixture: "Mixture", tasks: Sequence[str]) -> None:
        """Refuse a single task, which experts could not specialise on."""
        super().check(mixture, tasks)
        if self.of == "task" and len(tasks) < 2:
            raise ValueError(
                f"MutualInformation asks for experts that differ between tasks, and the data has only {tasks[0]}; give "
                "of: input"
            )
