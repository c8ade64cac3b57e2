"""The interface of balance between tasks: a spec, and what weighs losses or combines gradients while a fit runs.

Axes: S tasks, in the order of the data.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn


class Balancer(nn.Module):
    """Weighs the losses of tasks, combines the gradients that they have for the shared adapter, or both.

    What it learns by gradient is a parameter with one number a task; what else a resumed run needs is a buffer. All
    that it does follows from sums over processes, so that every process does the same. Both are in float64 and stay
    so when the module that it is part of is cast: sums over many batches do not fit half precision.

    Args:
        tasks: Names of the tasks.
        learning_rate: Peak rate of its parameters, where it has any.
    """

    def __init__(self, tasks: Sequence[str], learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.tasks, self.learning_rate = tuple(tasks), learning_rate
        self.register_buffer("ones", torch.ones(len(tasks), dtype=torch.float64), persistent=False)
        self.register_buffer("seen", torch.zeros(2, len(tasks), dtype=torch.float64), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Balancer":
        """Follow moves to a device; number types stay, and no number is rounded on the way."""
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self

    def weights(self) -> Tensor:
        """Return what the losses of each task's rows are multiplied by in the next batch, (S,); by default 1."""
        return self.get_buffer("ones")

    def offsets(self) -> Tensor | None:
        """Return what each token of a task adds to the loss besides, (S,); by default nothing."""
        return None

    def weigh(self, losses: Tensor, counts: Tensor, tasks: Tensor) -> Tensor:
        """Return the losses of rows as they count in training, (B,).

        Args:
            losses: Sum of the losses of each row's tokens, (B,).
            counts: How many tokens these are, (B,).
            tasks: Index of each row's task, (B,).
        """
        offsets, found = self.offsets(), losses * self.weights().to(losses)[tasks]
        return found if offsets is None else found + offsets.to(losses)[tasks] * counts

    def observe(self, losses: Tensor, counts: Tensor) -> None:
        """Add a batch to what the step under way has seen, all processes together.

        Args:
            losses: Sum of the losses of each task's tokens, not weighted, (S,); 0 for a task without any.
            counts: How many tokens these are, (S,).
        """
        self.get_buffer("seen").add_(torch.stack([losses, counts]).to(self.get_buffer("seen")))

    def step(self, products: Tensor | None = None) -> None:
        """Go on to the next step of the optimiser; one whose losses are not finite is forgotten.

        Args:
            products: As `combine` got them, where `Balance.reads_gradients`.
        """
        losses, counts = self.get_buffer("seen").clone()
        self.drop()
        if bool(losses.isfinite().all()):
            self.follow(losses, counts, products)

    def drop(self) -> None:
        """Forget the step under way, which is not taken."""
        self.get_buffer("seen").zero_()

    def follow(self, losses: Tensor, counts: Tensor, products: Tensor | None) -> None:
        """Change by a step that is taken; by default nothing changes.

        Args:
            losses: Sum of the losses of each task's tokens in all batches of the step, not weighted, (S,).
            counts: How many tokens these are, (S,).
            products: As in `step`.
        """

    def combine(self, products: Tensor, step: int) -> Tensor:
        """Return how much of each task's gradient the step takes, (S,); 1 for each is their plain sum.

        Called once a step where `Balance.reads_gradients`, and only with finite numbers.

        Args:
            products: Inner products of the tasks' gradients of the shared adapter, each of the weighted losses, in
                float64 on the CPU, (S, S); zeros for a task that the step has no row of.
            step: Of the optimiser, from 0.
        """
        return torch.ones(len(self.tasks), dtype=torch.float64)

    def readings(self) -> dict[str, float]:
        """Return numbers worth a line in a training's log: the weights, by name."""
        found = self.weights().tolist()
        return {f"balance/{name}": weight for name, weight in zip(self.tasks, found, strict=True)}


@dataclass(frozen=True, kw_only=True)
class Balance(ABC):
    """What a user writes to choose how tasks are balanced: a value bound by YAML."""

    reads_gradients: ClassVar[bool] = False
    """Whether it needs the gradients of the shared adapter task by task."""

    @abstractmethod
    def build(self, tasks: Sequence[str], seed: int) -> Balancer:
        """Return what balances the tasks of a fit.

        Args:
            tasks: Their names.
            seed: Of random choices.

        Raises:
            ValueError: A setting names a task that there is not.
        """


def check_at_least(part: Balance, name: str, bound: float, *, open_: bool = False) -> None:
    """Refuse a setting below a bound.

    Args:
        part: Whose.
        name: Of the setting.
        bound: The least value.
        open_: Whether the bound itself is refused too.

    Raises:
        ValueError: It is below.
    """
    value = getattr(part, name)
    if not value >= bound or (open_ and value == bound):
        raise ValueError(
            f"{type(part).__name__} got {name}={value}; give {'more than' if open_ else 'at least'} {bound:g}"
        )
