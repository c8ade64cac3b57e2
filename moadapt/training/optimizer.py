"""AdamW for stacked experts: an expert that nothing used in a step is not stepped.

A bank stacks its experts in one parameter, so an unused expert's rows get a gradient of zero, not none, and plain AdamW
would still decay them and move them by old momentum. Here an expert's rows are stepped as a parameter of their own:
with a step count of their own, and not at all where the expert's gradient at the bank is zero. Who is used can be fixed
before gradients of another source, such as an objective's, are added.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import AdamW, adamw


class ExpertAdamW(AdamW):
    """AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization") that skips unused experts.

    Args:
        params: Parameter groups, as of any torch optimiser.
        banks: For each bank its stacked parameters, each with the expert of every row, (R,); an expert is used where
            any of its rows in any of them has a gradient that is not zero.
        lr: Learning rate of groups that have none.
        betas: Decay of the two moments.
        weight_decay: Decay of groups that have none.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        banks: Sequence[Mapping[nn.Parameter, Tensor]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)
        self._stacks = [{p: list(_runs(rows)) for p, rows in bank.items()} for bank in banks]
        self._stacked = {parameter for stack in self._stacks for parameter in stack}
        self._fixed: set[tuple[int, int]] | None = None

    @torch.no_grad()
    def fix_used(self) -> None:
        """Take for the next step as used only what is now, so that gradients added later wake no unused expert."""
        self._fixed = self._used()

    @torch.no_grad()
    def of_used(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Return a gradient that is zero in the rows of experts that the next step leaves alone.

        Args:
            parameter: One of those that this optimiser steps; where it is no bank's stack, the gradient stays.
            gradient: Of its shape.
        """
        used = self._used() if self._fixed is None else self._fixed
        for bank, stack in enumerate(self._stacks):
            for expert, rows in stack.get(parameter, ()):  # type: ignore[call-overload]
                if (bank, expert) not in used:
                    gradient = gradient.clone()
                    gradient[rows] = 0.0
        return gradient

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Computes the gradients, if they are not there yet.

        Returns:
            What the closure returned.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        gradients = {parameter: parameter.grad for parameter in self._stacked}
        try:
            for parameter in self._stacked:
                parameter.grad = None  # a step of the others only
            super().step()
        finally:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
        used = self._used() if self._fixed is None else self._fixed
        for group in self.param_groups:
            self._step_stacks(group, used)
        self._fixed = None
        return result

    def _used(self) -> set[tuple[int, int]]:
        """Return (bank, expert) of every expert with a gradient; one transfer from the device in all."""
        pairs, flags = [], []
        for bank, stack in enumerate(self._stacks):
            for parameter, runs in stack.items():
                if parameter.grad is not None:
                    rows = (parameter.grad != 0).unsqueeze(-1).flatten(1).any(dim=1)  # a row may be one number
                    pairs += [(bank, expert) for expert, _ in runs]
                    flags += [rows[part].any() for _, part in runs]
        told = torch.stack(flags).tolist() if flags else []
        return {pair for pair, flag in zip(pairs, told, strict=True) if flag}

    def _step_stacks(self, group: dict[str, Any], used: set[tuple[int, int]]) -> None:
        """Step the used experts of a group, each run of rows as a parameter of its own."""
        members = {id(parameter) for parameter in group["params"]}
        parts: list[tuple[Tensor, ...]] = []
        for bank, stack in enumerate(self._stacks):
            for parameter, runs in stack.items():
                if id(parameter) not in members or parameter.grad is None:
                    continue
                state = self._state_of(parameter, len(runs))
                for index, (expert, rows) in enumerate(runs):
                    if (bank, expert) in used:
                        tensors = (parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                        parts.append((parameter[rows], *(t[rows] for t in tensors), state["step"][index]))
        if parts:
            values, gradients, means, squares, steps = (list(column) for column in zip(*parts, strict=True))
            adamw(
                values, gradients, means, squares, [], steps,
                amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip

    def _state_of(self, parameter: Tensor, runs: int) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(runs)  # on the CPU, as torch keeps it
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def _runs(rows: Tensor) -> Iterator[tuple[int, slice]]:
    """Return each stretch of rows of one expert."""
    experts = rows.tolist()
    edges = [*(i for i, expert in enumerate(experts) if i == 0 or expert != experts[i - 1]), len(experts)]
    return ((experts[first], slice(first, last)) for first, last in pairwise(edges))


def add_gradients(value: Tensor, optimizer: ExpertAdamW) -> None:
    """Add the gradients of a scalar to those that an optimiser's parameters have, and fix which experts it steps.

    What the scalar does not reach is left alone, and so are experts without a gradient.
    """
    optimizer.fix_used()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            gradient = optimizer.of_used(parameter, gradient)
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
