"""How many tokens rows have, measured before training, so that a budget of tokens can be kept to.

A row is prepared as training prepares it, pictures and all, and of several answers the longest counts. So this costs
about as much as an epoch's loading does, at each start of a run.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moadapt.training.classes import ClassCollator
from moadapt.training.collate import Collator, Item
from moadapt.training.loaders import Rows, prepared
from moadapt.training.order import Draw

_AT_A_TIME = 16


class _Measured:
    """Rows of a split with their lengths, (B, 2).

    Args:
        collator: Knows what a row becomes.
    """

    def __init__(self, collator: Collator | ClassCollator) -> None:
        self.collator = collator

    def __call__(self, items: Sequence[Item]) -> Tensor:
        """Return index and length of each row."""
        return torch.tensor([[item.row, self.collator.length(item)] for item in items]).reshape(-1, 2)


def row_lengths(
    rows: Rows, collator: Collator | ClassCollator, num_workers: int, process: int = 0, num_processes: int = 1
) -> Tensor:
    """Return the tokens of every row, prompt and longest answer, (N,); 0 where another process measures it.

    Args:
        rows: The rows of a split; those that are skipped in training have length 0.
        collator: Makes their batches.
        num_workers: Processes that measure beside this one, which then only waits for them.
        process: Index of this process.
        num_processes: How many processes share the rows.

    Raises:
        ValueError: The base reads no tokens, or a row cannot be used.
    """
    lengths = torch.zeros(len(rows), dtype=torch.long)
    for found in prepared(rows, _own(len(rows), process, num_processes), _Measured(collator), num_workers):
        lengths[found[:, 0]] = found[:, 1]
    return lengths


def _own(count: int, process: int, num_processes: int) -> Iterator[list[Draw]]:
    own = range(process, count, num_processes)
    for start in range(0, len(own), _AT_A_TIME):
        yield [Draw(row, 0) for row in own[start : start + _AT_A_TIME]]
