"""The low-rank fast path: add a weighted stack of rank-one terms to a linear layer's output.

All adapters of a site are stacked along the rank axis: `down (R, D)`, `up (R, F)`, both row-major. Weights act in rank
space, so that no tensor has an expert axis beside a feature axis, and the product is added into the base's output in
place. Two forms, both exact:

- stacked: `y += (x down^T * w) up` with `w (B|1, T|1, R)` the experts' weights spread over their ranks; one product
  down, one up. Where the site is a plain linear layer, its own product is part of the same step, so that the backward
  pass adds all of the input's gradient into one buffer.
- gathered: each row takes its chosen ranks out of the stack, `y_b += (x_b down_b^T * w_b) up_b`, `w (B|1, T|1, K R)`.
  For choices by token there is `moadapt.adapters.tiled`.

The backward pass is written out because autograd would keep the spread weights and the weighted product, allocate the
output twice, and fill a whole stack with zeros for every slice. Axes: B rows, T tokens, D in, F out, E experts, R
stacked ranks, S ranks of the shared adapter, which come first.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Ranks:
    """Whose the stacked ranks are.

    Args:
        shared: S.
        owner: Index of the expert that each rank behind the shared ones belongs to, (R - S,).
        scale: Scale of every rank in float64, (R,), on the device that all of this goes to.
    """

    def __init__(self, shared: int, owner: Tensor, scale: Tensor) -> None:
        self.shared, self.owner = shared, owner.to(scale.device)
        onto = scale.new_zeros(len(owner), int(owner.max()) + 1 if len(owner) else 0)
        onto.scatter_(1, self.owner.unsqueeze(1), scale[shared:].unsqueeze(1))
        types = (torch.float32, torch.float64)  # those that routers decide in
        self._scale = {dtype: scale.to(dtype) for dtype in types}
        self._onto = {dtype: onto.to(dtype) for dtype in types}

    def scale(self, dtype: torch.dtype) -> Tensor:
        """Return the scale of every rank, (R,)."""
        known = self._scale.get(dtype)
        return self._scale[torch.float64].to(dtype) if known is None else known

    @cached_property
    def of_shared(self) -> "Ranks":
        """The ranks of the shared adapter alone."""
        return Ranks(self.shared, self.owner[:0], self._scale[torch.float64][: self.shared])

    def spread(self, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return weight times scale of every rank.

        Args:
            weights: Weights of the experts, (B|1, T|1, E); None where there are none.
            dtype: What to return.

        Returns:
            (B|1, T|1, R).
        """
        if weights is None:
            return self.scale(dtype).reshape(1, 1, -1)
        scale = self.scale(weights.dtype)
        absent = self._onto[torch.float32].shape[1] - weights.shape[-1]  # it may be older than an expert
        experts = functional.pad(weights, (0, max(0, absent))).index_select(-1, self.owner) * scale[self.shared :]
        if not self.shared:
            return experts.to(dtype)
        shared = scale[: self.shared].expand(*weights.shape[:2], -1)
        return torch.cat([shared, experts], dim=-1).to(dtype)

    def collect(self, gradient: Tensor, weights: Tensor) -> Tensor:
        """Return the gradient of the experts' weights from that of the spread ones, (B|1, T|1, R)."""
        onto = self._onto[torch.float64 if gradient.dtype == torch.float64 else torch.float32]
        found = gradient.to(onto.dtype).flatten(0, 1)[:, self.shared :] @ onto
        found = functional.pad(found, (0, weights.shape[-1] - onto.shape[1]))  # the last experts may be absent here
        return found.reshape(weights.shape).to(weights.dtype)


def add_stacked(y: Tensor, x: Tensor, down: Tensor, up: Tensor, weights: Tensor | None, ranks: Ranks) -> Tensor:
    """Add the stacked form to `y` in place and return it.

    Args:
        y: Fresh output, (B, T, F).
        x: Input, (B, T, D), of the same dtype.
        down: (R, D).
        up: (R, F).
        weights: Weights of the experts, (B|1, T|1, E); None where there are none.
        ranks: Whose the ranks are.
    """
    if torch.compiler.is_compiling():  # dynamo mistakes shapes where a Function writes to a view, and fuses this anyway
        return y + ((x @ down.T) * ranks.spread(weights, y.dtype)) @ up
    if torch.is_grad_enabled():
        return _Stacked.apply(y, x, down, up, weights, ranks)  # type: ignore[no-any-return, no-untyped-call]
    return _add_stacked(y, x @ down.T, up, ranks.spread(weights, y.dtype))


def stacked_linear(
    linear: nn.Linear, x: Tensor, down: Tensor, up: Tensor, weights: Tensor | None, ranks: Ranks
) -> Tensor:
    """Return a frozen linear layer's output with the stacked form added, (B, T, F); see `add_stacked`."""
    frozen = (linear.weight, linear.bias)
    return _StackedLinear.apply(x, down, up, weights, ranks, *frozen)  # type: ignore[no-any-return, no-untyped-call]


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
    if torch.compiler.is_compiling():
        return torch.baddbmm(y, torch.bmm(x, take_rows(down, ranks).mT) * weights, take_rows(up, ranks))
    if torch.is_grad_enabled():
        return _Gathered.apply(y, x, down, up, weights, ranks)  # type: ignore[no-any-return, no-untyped-call]
    shrunk = torch.bmm(x, take_rows(down, ranks).mT) * weights
    return y.baddbmm_(shrunk, take_rows(up, ranks))


def take_rows(rows: Tensor, which: Tensor) -> Tensor:
    """Return rows (..., D) by their indices (...); faster than indexing with a tensor of more than one axis."""
    return rows.index_select(0, which.flatten()).view(*which.shape, *rows.shape[1:])


def scatter_rows(stack: Tensor, which: Tensor, gradient: Tensor) -> Tensor:
    """Add the gradient (B, N, D) of rows that were taken up into a gradient of the stack (R, D)."""
    return torch.zeros_like(stack).index_add_(0, which.flatten(), gradient.flatten(0, 1))


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
    def forward(
        ctx: Any, y: Tensor, x: Tensor, down: Tensor, up: Tensor, weights: Tensor | None, ranks: Ranks
    ) -> Tensor:
        shrunk = x @ down.T
        ctx.ranks = ranks
        ctx.save_for_backward(x, down, up, weights, shrunk)
        ctx.mark_dirty(y)
        return _add_stacked(y, shrunk, up, ranks.spread(weights, y.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once, as checkpointing gives every tensor back only once
        grad_shrunk, *others = _stacked_gradients(saved, ctx.ranks, grad, ctx.needs_input_grad[2:5])
        down = saved[1]
        grad_x = (grad_shrunk @ down).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[1] else None
        return grad, grad_x, *others, None


class _StackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        weights: Tensor | None,
        ranks: Ranks,
        base: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        shrunk = x @ down.T
        ctx.ranks = ranks
        ctx.save_for_backward(x, down, up, weights, shrunk, base)
        return _add_stacked(functional.linear(x, base, bias), shrunk, up, ranks.spread(weights, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, base = ctx.saved_tensors
        grad_shrunk, *others = _stacked_gradients(saved, ctx.ranks, grad, ctx.needs_input_grad[1:4])
        grad_x = None
        if ctx.needs_input_grad[0]:
            down = saved[1]
            grad_x = (grad.reshape(-1, grad.shape[-1]) @ base).addmm_(grad_shrunk, down).view(*grad.shape[:-1], -1)
        return grad_x, *others, None, None, None


def _stacked_gradients(
    saved: Sequence[Any], ranks: Ranks, grad: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of what `down` gave, (B T, R), and of `down`, `up` and the weights where needed."""
    x, _, up, weights, shrunk = saved
    flat = grad.reshape(-1, grad.shape[-1])
    spread = ranks.spread(weights, grad.dtype)
    grad_weighted = (flat @ up.T).view_as(shrunk)
    grad_shrunk = (grad_weighted * spread).flatten(0, -2)
    grad_down = grad_shrunk.T @ x.reshape(-1, x.shape[-1]) if needs[0] else None
    grad_up = (shrunk * spread).flatten(0, -2).T @ flat if needs[1] else None
    grad_weights = ranks.collect(_reduce_to(grad_weighted * shrunk, spread.shape), weights) if needs[2] else None
    return grad_shrunk, grad_down, grad_up, grad_weights


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, down: Tensor, up: Tensor, weights: Tensor, ranks: Tensor) -> Tensor:
        shrunk = torch.bmm(x, take_rows(down, ranks).mT)
        ctx.save_for_backward(x, down, up, weights, ranks, shrunk)
        ctx.mark_dirty(y)
        return y.baddbmm_(shrunk * weights, take_rows(up, ranks))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, weights, ranks, shrunk = ctx.saved_tensors
        _, needs_x, needs_down, needs_up, needs_weights, _ = ctx.needs_input_grad
        grad_weighted = torch.bmm(grad, take_rows(up, ranks).mT)
        grad_shrunk = grad_weighted * weights
        grad_x = torch.bmm(grad_shrunk, take_rows(down, ranks)) if needs_x else None
        grad_down = scatter_rows(down, ranks, torch.bmm(grad_shrunk.mT, x)) if needs_down else None
        grad_up = scatter_rows(up, ranks, torch.bmm((shrunk * weights).mT, grad)) if needs_up else None
        grad_weights = _reduce_to(grad_weighted * shrunk, weights.shape) if needs_weights else None
        return grad, grad_x, grad_down, grad_up, grad_weights, None
