"""Skills mixed by task in parameter space: Poly, and with several heads MHR (multi-head routing).

Ponti et al., "Combining Modular Skills in Multitask Learning"; Caccia et al., "Multi-Head Adapter Routing for
Cross-Task Generalization", section 3. Each task has logits Z over skills; its adapter is the one whose factors are
the blends `sum_s w_s A_s` and `sum_s w_s B_s`, with `w = sigmoid(Z) / sum sigmoid(Z)`, head by head over equal slices
of the features. Training takes a relaxed Bernoulli sample in place of the sigmoid, one a task and step, the same on
all processes. Trained alone on frozen skills, Z is MHR-z; averaging the skills is MHR-mu, see `moadapt.average`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moadapt.registry import ROUTERS
from moadapt.router import RoutingContext
from moadapt.routing import Combines, Routing
from moadapt_routers.task_router import TaskRouter, TaskRouterSpec, grown

_START = 1e-3


@ROUTERS.register("poly")
@dataclass(frozen=True, kw_only=True)
class Poly(TaskRouterSpec):
    """Each task blends the factors of all experts, of one rank, into an adapter of its own; merges exactly per task.

    Args:
        heads: How many slices of the features have weights of their own; 1 is Poly, more is MHR. They must divide the
            widths of every site.

    Raises:
        ValueError: There is no head.
    """

    heads: int = 1

    combines: ClassVar[Combines] = "parameters"

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        if self.heads < 1:
            raise ValueError(f"Poly got heads={self.heads}; it must be at least 1")

    @property
    def num_heads(self) -> int:
        """How many slices of the features have weights of their own, H."""
        return self.heads

    def build(self, dim: int, num_experts: int) -> "PolyRouter":
        """Build the router of one place; `dim` is not used."""
        return PolyRouter(len(self.tasks) or num_experts, self.heads, num_experts, owned=not self.tasks)


class PolyRouter(TaskRouter):
    """Holds Z, (tasks, H, E).

    Args:
        num_tasks: How many tasks.
        heads: H.
        num_experts: E.
        owned: Whether tasks come and go with experts.
    """

    def __init__(self, num_tasks: int, heads: int, num_experts: int, *, owned: bool) -> None:
        super().__init__(num_experts, owned=owned)
        self.z = nn.Parameter(torch.empty(num_tasks, heads, num_experts).uniform_(-_START, _START))

    def logits(self) -> Tensor:
        """Return the logarithm of sigmoid(Z), whose softmax is `sigmoid(Z) / sum sigmoid(Z)`."""
        return functional.logsigmoid(self.z.float())

    def forward(self, context: RoutingContext) -> Routing:
        """Return weights of parameters, (B, 1, H, E)."""
        logits = self.logits()
        if self.training:
            logits = functional.logsigmoid(self.z.float() + _logistic(self.z, context.noise))
        return replace(self.of_tasks(logits, context), combines=Poly.combines)

    def grow(self, count: int) -> None:
        """Add experts, and tasks where each is one's own, with logits near 0."""
        self.z = grown(self.z, count if self.owned else 0, count, _START)
        self.num_experts += count

    def trim(self, keep: Sequence[int]) -> None:
        """Keep these experts, and their tasks where each is one's own."""
        kept = self.z.detach()[..., list(keep)]
        self.z = nn.Parameter(kept[list(keep)] if self.owned else kept.clone())
        self.num_experts = len(keep)


def _logistic(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw from the logistic distribution; the sigmoid of Z plus it is a relaxed Bernoulli sample of temperature 1."""
    device = like.device if generator is None else generator.device
    uniform = torch.rand(like.shape, generator=generator, device=device).clamp(1e-6, 1 - 1e-6)
    return torch.logit(uniform).to(like.device)
