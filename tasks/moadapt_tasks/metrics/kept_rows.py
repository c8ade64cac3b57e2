"""Metrics that cannot be summed row by row: they keep what they need of every row, and compute from all of them."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from moadapt_tasks.metrics.packed_texts import pack_texts, unpack_texts


class KeptRows(Metric):
    """Keeps rows as JSON texts in bytes, so that processes can gather them.

    Subclasses call `keep` in `update` and `kept` in `compute`. The value that `forward` gives for a batch takes the
    batch for all rows.

    Args:
        **kwargs: Options of every torchmetrics metric.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A MetricCollection merges metrics whose states bear equal names and happen to be equal after the first batch.
        self._bytes, self._lengths = (f"{type(self).__name__.lower()}_{name}" for name in ("bytes", "lengths"))
        self.add_state(self._bytes, [], dist_reduce_fx="cat")
        self.add_state(self._lengths, [], dist_reduce_fx="cat")
        self.keep([])

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        self.keep([])

    def keep(self, rows: Sequence[Any]) -> None:
        """Keep what JSON can hold of some rows.

        Called without rows too: a process whose lists are empty would gather float32 against the others' bytes.

        Args:
            rows: One value a row.
        """
        data, lengths = pack_texts([json.dumps(row) for row in rows])
        for name, values in ((self._bytes, data), (self._lengths, lengths)):
            getattr(self, name).append(values.to(self.device))

    def kept(self) -> list[Any]:
        """Return all rows kept, in the order of processes and of calls."""
        data, lengths = (dim_zero_cat(getattr(self, name)) for name in (self._bytes, self._lengths))
        return [json.loads(text) for text in unpack_texts(data, lengths)]

    def number(self, value: float) -> Tensor:
        """Return a score as the metric's value."""
        return torch.tensor(value, dtype=torch.float64, device=self.device)
