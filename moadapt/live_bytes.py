"""Counts the bytes of the tensors that are alive while a program runs, each storage once."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts tensors that are given or made while it is active, until they are freed; also those without numbers.

    What a kernel allocates and frees by itself is not seen.

    Args:
        held: Tensors that are alive before.

    Attributes:
        now: Bytes alive.
        peak: The most there were at once.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()
        for tensor in held:
            self._add(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation, and count what it gives."""
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor):
                self._add(each)
        return found

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = int(storage._cdata)
        if key not in self._known:
            self._known.add(key)
            weakref.finalize(storage, self._drop, key, storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, each storage counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({int(storage._cdata): storage.nbytes() for storage in storages}.values())
