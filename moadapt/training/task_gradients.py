"""The gradients of the shared adapter task by task, over the batches of a step and over all processes.

They are summed over processes before anything is made of them, so that every process makes the same of them.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moadapt.shared_copies import Copied, SharedCopies


class TaskGradients:
    """Collects them from the backward passes of a step; one number a task for each parameter of the shared adapter.

    Args:
        copies: Of the shared adapter, one a task.
    """

    def __init__(self, copies: SharedCopies) -> None:
        self._copies = copies
        self._parameters = copies.parameters()
        like, sizes = self._parameters[0], [parameter.numel() for parameter in self._parameters]
        self._whole = torch.zeros(copies.count, sum(sizes), device=like.device, dtype=like.dtype)
        self._parts = dict(zip(self._parameters, torch.split(self._whole, sizes, dim=1), strict=True))

    def collect(self, rows: Tensor) -> Copied:
        """Return copies for the passes of one batch, whose backward pass adds its gradients to the others.

        Args:
            rows: Index of each row's task, (B,).
        """
        for parameter, copied in self._copies.take().items():
            copied.register_hook(partial(_add, self._parts[parameter]))  # type: ignore[no-untyped-call]
        return self._copies.used_by(rows)

    def measure(self, rows: Tensor, losses: Callable[[Copied], Tensor]) -> None:
        """Add the gradients of one batch, and leave those of all parameters as they are.

        Args:
            rows: Index of each row's task, (B,).
            losses: Runs the batch with copies, and returns the losses of its rows, (B,).
        """
        taken = self._copies.take()
        total = losses(self._copies.used_by(rows)).sum()
        found = torch.autograd.grad(total, list(taken.values()), allow_unused=True)
        for parameter, gradient in zip(taken, found, strict=True):
            if gradient is not None:
                _add(self._parts[parameter], gradient)

    def sum_up(self, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Reduce the gradients over processes and return their inner products, in float64 on the CPU, (S, S).

        Args:
            reduce: Does it, as the gradients of parameters are reduced.
        """
        self._whole.copy_(reduce(self._whole))
        products = torch.zeros(len(self._whole), len(self._whole), dtype=torch.float64, device=self._whole.device)
        for part in self._parts.values():  # one by one, as all of them in float64 may take much room
            exact = part.double()
            products += exact @ exact.T
        return products.cpu()

    def write(self, shares: Tensor, scale: float) -> None:
        """Give the parameters weighted sums of their gradients in the place of the plain ones.

        Args:
            shares: Weight of each task, (S,).
            scale: What the gradients are multiplied by besides.
        """
        weights = (shares * scale).to(self._whole)
        for parameter, part in self._parts.items():
            if parameter.grad is not None:
                parameter.grad.copy_((weights @ part).view_as(parameter))

    def clear(self) -> None:
        """Start anew, for the next step."""
        self._whole.zero_()


def cosines(products: Tensor) -> Tensor:
    """Return the cosines between gradients, NaN where there is none, (S, S).

    Args:
        products: Their inner products, (S, S).
    """
    norms = products.diagonal().clamp(min=0).sqrt()
    norms = norms.masked_fill(norms == 0, torch.nan)
    return (products / norms / norms.unsqueeze(1)).clamp(-1, 1)


def _add(whole: Tensor, gradient: Tensor) -> None:
    whole.add_(gradient.flatten(1))
