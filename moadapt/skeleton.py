"""Models without numbers: tensors of floating-point numbers have a shape and a type and take no memory.

Whole numbers and truth values, such as token ids, masks and where images lie, are real, since programs decide by them.
Of those that would follow from floating-point numbers, whole numbers, such as the experts that a router chooses, are
all zero, and comparisons all true, save for equality and what tells of numbers that are no numbers. So a model far
larger than the memory runs forward and backward, and what it would hold can be counted. Kernels are those that torch
chooses for a CPU.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

_ATEN = torch.ops.aten
_BY_INDEX = (_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default)
_TOLD = {_ATEN._local_scalar_dense.default: 0.0, _ATEN.allclose.default: True, _ATEN.equal.default: True}
_FALSE = (_ATEN.eq, _ATEN.isnan, _ATEN.isinf)


@contextmanager
def skeleton() -> Iterator[None]:
    """Let models that are built or run within the block have no numbers; they stay of use only in such blocks."""
    with _Skeleton(FakeTensorMode(allow_non_fake_inputs=True)):
        yield


class _Skeleton(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs what is about real tensors for real, and all else on shapes."""

    def __init__(self, shapes: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shapes = shapes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        kwargs = dict(kwargs or {})
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if not any(isinstance(each, FakeTensor) for each in given):
            return self._from_real(lambda: func(*args, **kwargs), made=not given)
        if func in _TOLD:
            return _TOLD[func]
        if func in _BY_INDEX:
            args = [args[0], _places(args[1]), *args[2:]]
        elif func is _ATEN.masked_select.default:
            func, args = _ATEN.index.Tensor, [args[0], _places([args[1].expand(args[0].shape)])]
        with self._shapes:
            found = func(*args, **kwargs)
        self._shapes.fake_tensor_converter.tensor_memo.clear()  # its weak references keep modules from moving
        assumed = func.overloadpacket not in _FALSE
        return tree_map_only(FakeTensor, lambda each: _without_values(each, assumed), found)

    def _from_real(self, run: Callable[[], Any], made: bool) -> Any:
        """Return real results where they are whole numbers, else their shapes; fresh ones are not made for it."""
        if made:
            with self._shapes:
                found = run()
            if not any(_is_whole(each) for each in tree_leaves(found)):
                return found
        with _disable_current_modes():
            found = run()
        return tree_map_only(Tensor, self._emptied, found)

    def _emptied(self, found: Tensor) -> Tensor:
        """Return a tensor without its numbers, where it has any that are not whole."""
        if _is_whole(found):
            return found
        with self._shapes:
            return torch.empty_strided(found.shape, found.stride(), dtype=found.dtype)


def _is_whole(found: Any) -> bool:
    return isinstance(found, Tensor) and not found.is_floating_point() and not found.is_complex()


def _without_values(found: FakeTensor, assumed: bool) -> Tensor:
    """Put zeros in the place of whole numbers that nobody can know, and what is assumed in that of truth values."""
    if not _is_whole(found):
        return found
    with _disable_current_modes():
        return torch.full(found.shape, assumed and found.dtype == torch.bool, dtype=found.dtype)


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Put the places where masks are true in the place of masks, whose count of them a shape cannot tell."""
    found: list[Tensor | None] = []
    with _disable_current_modes():
        for each in indices:
            masked = each is not None and each.dtype in (torch.bool, torch.uint8)
            found += each.nonzero().unbind(dim=1) if masked and each is not None else [each]
    return found
