"""The low-rank fast path: add a weighted stack of rank-one terms to a fresh output.

All adapters of a site are stacked along the rank axis: `down (R, D)`, `up (R, F)`, both row-major. Weights act in rank
space, so that no tensor has an expert axis beside a feature axis, and the product is added into the base's output in
place. Two forms, both exact:

- stacked: `y += (x down^T * w) up` with `w (B|1, T|1, R)`; one product down, one up.
- gathered: each row takes its chosen ranks out of the stack, `y_b += (x_b down_b^T * w_b) up_b`, `w (B|1, T|1, K R)`.

The backward pass is written out because autograd would keep the weighted product, allocate the output twice, and fill
a whole stack with zeros for every slice. Axes: B rows, T tokens, D in, F out, R stacked ranks.
"""

from typing import Any

import torch
from torch import Tensor


def add_stacked(y: Tensor, x: Tensor, down: Tensor, up: Tensor, weights: Tensor) -> Tensor:
    """Add the stacked form to `y` in place and return it.

    Args:
        y: Fresh output, (B, T, F).
        x: Input, (B, T, D), of the same dtype.
        down: (R, D).
        up: (R, F).
        weights: Weight times scale of every rank, (B|1, T|1, R).
    """
    if torch.compiler.is_compiling():  # dynamo mistakes shapes where a Function writes to a view, and fuses this anyway
        return y + ((x @ down.T) * weights) @ up
    if torch.is_grad_enabled():
        return _Stacked.apply(y, x, down, up, weights)  # type: ignore[no-any-return, no-untyped-call]
    return _add_stacked(y, x @ down.T, up, weights)


def add_gathered(y: Tensor, x: Tensor, down: Tensor, up: Tensor, weights: Tensor, ranks: Tensor) -> Tensor:
    """Add the gathered form to `y` in place and return it.

    Args:
        y: Fresh output, (B, T, F).
        x: Input, (B, T, D), of the same dtype.
        down: (R, D).
        up: (R, F).
        weights: Weight times scale of the chosen ranks, (B, T|1, N), zero where a slot is padding.
        ranks: Which ranks a row takes, (B, N).
    """
    if torch.is_grad_enabled():
        return _Gathered.apply(y, x, down, up, weights, ranks)  # type: ignore[no-any-return, no-untyped-call]
    shrunk = torch.bmm(x, down[ranks].mT) * weights
    return y.baddbmm_(shrunk, up[ranks])


def _add_stacked(y: Tensor, shrunk: Tensor, up: Tensor, weights: Tensor) -> Tensor:
    weighted = (shrunk * weights).flatten(0, -2)
    y.view(-1, y.shape[-1]).addmm_(weighted, up)
    return y


def _reduce_to(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Sum a gradient over the axes along which its tensor was broadcast."""
    axes = [i for i, (have, want) in enumerate(zip(gradient.shape, shape, strict=True)) if have != want]
    return gradient.sum(dim=axes, keepdim=True) if axes else gradient


class _Stacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, down: Tensor, up: Tensor, weights: Tensor) -> Tensor:
        shrunk = x @ down.T
        ctx.save_for_backward(x, down, up, weights, shrunk)
        ctx.mark_dirty(y)
        return _add_stacked(y, shrunk, up, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, weights, shrunk = ctx.saved_tensors
        _, needs_x, needs_down, needs_up, needs_weights = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        grad_weighted = (flat @ up.T).view_as(shrunk)
        grad_shrunk = (grad_weighted * weights).flatten(0, -2)
        grad_x = (grad_shrunk @ down).view_as(x) if needs_x else None
        grad_down = grad_shrunk.T @ x.reshape(-1, x.shape[-1]) if needs_down else None
        grad_up = (shrunk * weights).flatten(0, -2).T @ flat if needs_up else None
        grad_weights = _reduce_to(grad_weighted * shrunk, weights.shape) if needs_weights else None
        return grad, grad_x, grad_down, grad_up, grad_weights


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, down: Tensor, up: Tensor, weights: Tensor, ranks: Tensor) -> Tensor:
        shrunk = torch.bmm(x, down[ranks].mT)
        ctx.save_for_backward(x, down, up, weights, ranks, shrunk)
        ctx.mark_dirty(y)
        return y.baddbmm_(shrunk * weights, up[ranks])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, weights, ranks, shrunk = ctx.saved_tensors
        _, needs_x, needs_down, needs_up, needs_weights, _ = ctx.needs_input_grad
        grad_weighted = torch.bmm(grad, up[ranks].mT)
        grad_shrunk = grad_weighted * weights
        grad_x = torch.bmm(grad_shrunk, down[ranks]) if needs_x else None
        grad_down = _scatter(down, ranks, torch.bmm(grad_shrunk.mT, x)) if needs_down else None
        grad_up = _scatter(up, ranks, torch.bmm((shrunk * weights).mT, grad)) if needs_up else None
        grad_weights = _reduce_to(grad_weighted * shrunk, weights.shape) if needs_weights else None
        return grad, grad_x, grad_down, grad_up, grad_weights, None


def _scatter(stack: Tensor, ranks: Tensor, gradient: Tensor) -> Tensor:
    """Add the rows' gradients (B, N, D) up into a gradient of the stack (R, D)."""
    return torch.zeros_like(stack).index_add_(0, ranks.flatten(), gradient.flatten(0, 1))
