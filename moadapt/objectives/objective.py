"""The objective interfaces: specs that give one number, which training makes small beside the loss of the answers.

An objective on parameters is the same on every process and in every batch of a step, so its gradient is added once a
step. One on routings is a function of sums over the inputs that were routed; these are summed over all processes, so
that its value and its gradient are those of the whole batch, however it is shared out.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from moadapt.routed import Routed
from moadapt.router import SCOPES, Scope

if TYPE_CHECKING:
    from moadapt.mixture import Mixture


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):  # noqa: B024, the parser takes subclasses of abstract classes alone
    """What a user writes to choose an objective: a value bound by YAML.

    Args:
        weight: What its value is multiplied by before it joins the loss, 0 or more.

    Raises:
        ValueError: The weight is negative.
    """

    weight: float = 0.1

    def __post_init__(self) -> None:
        """Check the weight."""
        if self.weight < 0:
            raise ValueError(f"{type(self).__name__} got weight={self.weight}; give 0 or more")


@dataclass(frozen=True, kw_only=True)
class ParameterObjective(Objective, ABC):
    """An objective that depends on parameters alone."""

    @abstractmethod
    def value(self, mixture: "Mixture") -> Tensor:
        """Return the number to make small, not weighted, as a scalar through which gradients reach the adapters.

        Args:
            mixture: The mixture in training.
        """


@dataclass(frozen=True, kw_only=True)
class RoutingObjective(Objective, ABC):
    """An objective that depends on what routers decide, place by place; its value is the mean over places."""

    scopes: ClassVar[tuple[Scope, ...]] = SCOPES
    """Scopes of the routers that it can judge."""
    counts_answers: ClassVar[bool] = False
    """Whether tokens of answers count, as those of the prompt do."""
    needs_utilities: ClassVar[bool] = False
    """Whether training must measure what each expert by itself is worth to every row, by E + 1 passes more a step."""

    @abstractmethod
    def sums(self, routed: Routed) -> Tensor:
        """Add up, over the inputs that count, what the value is made of, (S,).

        Args:
            routed: The inputs that one place routed.
        """

    @abstractmethod
    def value(self, sums: Tensor, routed: Routed) -> Tensor:
        """Return the number to make small at one place, not weighted, as a scalar.

        Args:
            sums: What `sums` gave, over all processes, (S,).
            routed: Inputs of this process there; for their numbers of experts and tasks.
        """

    def check(self, mixture: "Mixture", tasks: Sequence[str]) -> None:
        """Refuse a mixture that the objective makes no sense for; a weight of 0 only measures, which always does.

        Args:
            mixture: The mixture to be trained.
            tasks: Names of the tasks of the data.

        Raises:
            ValueError: Its routers or experts are of the wrong kind; the message says what to do.
        """
        router = mixture.spec.router
        if not self.weight or router is None:
            return
        trains = any(parameter.requires_grad for parameter in mixture.routers.parameters())
        if router.depends_on != "input" and not trains:
            raise ValueError(
                f"{type(self).__name__} cannot move {type(router).__name__}, which has nothing to train; give a router "
                "that learns, leave the objective out, or give it weight: 0 to measure only"
            )
        if len(mixture.experts) < 2:
            raise ValueError(
                f"{type(self).__name__} compares experts, and there is only {mixture.experts[0]}; give more, or leave "
                "the objective out"
            )
