"""Sums of gradients over processes, made once a step from whatever gradients each process has.

Processes that hold different tasks reach different adapters: a tower without a picture is not run at all. Torch's DDP
would wait for gradients that never come, or, with `find_unused_parameters`, walk through the graph in every step. Here
a process says for each parameter whether it has a gradient, in the same message as the gradients.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def add_up_gradients(parameters: Iterable[nn.Parameter], reduce: Callable[[Tensor], Tensor]) -> None:
    """Give every parameter the sum of its gradients over all processes, in one message for each number type.

    A process without a gradient adds nothing. Where no process has one there is none afterwards, so that an optimiser
    leaves the parameter alone, as it would in a single process with all rows.

    Args:
        parameters: The same ones, in the same order, on all processes.
        reduce: Sums a tensor over processes.
    """
    by_type: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_type.setdefault(parameter.dtype, []).append(parameter)
    for same in by_type.values():
        _add_up(same, reduce)


def _add_up(parameters: list[nn.Parameter], reduce: Callable[[Tensor], Tensor]) -> None:
    first = parameters[0]
    gradients = [first.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]
    held = torch.tensor([p.grad is not None for p in parameters], dtype=first.dtype).to(first.device)
    sizes = [len(held), *(p.numel() for p in parameters)]
    found, *sums = torch.split(reduce(torch.cat([held, *gradients])), sizes)
    for parameter, total, anywhere in zip(parameters, sums, found.tolist(), strict=True):
        if anywhere:
            total = total.view_as(parameter)
            parameter.grad = total.clone() if parameter.grad is None else parameter.grad.copy_(total)
