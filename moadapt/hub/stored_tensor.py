"""Tensors of a foreign file: told by name, shape and number type first, and read only when they are wanted."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

FLOATS = frozenset({"float32", "float16", "bfloat16", "float64"})


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Args:
        shape: Its shape.
        dtype: Its number type, as torch calls it, or as the file does where torch has none such.
        read: Returns it.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]

    @property
    def is_float(self) -> bool:
        """Whether it holds numbers that adapters are made of."""
        return self.dtype in FLOATS
