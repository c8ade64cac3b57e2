"""One process of the two behind the fixture `on_two_processes`: a script that is given `link`, `rank` and `meeting`.

It is no importable module on purpose: how pytest names test modules depends on its import mode, and a spawned process
must find its code under any.
"""

import pickle
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed
from torch import Tensor
from torchmetrics import Metric

Batch = tuple[list[Any], list[Any]]


def as_floats(value: Tensor | dict[str, Tensor]) -> dict[str, float]:
    """Return what a metric computed as numbers by name."""
    named = value if isinstance(value, dict) else {"value": value}
    return {name: number.item() for name, number in named.items()}


def measure(metric: Metric, batches: list[Batch]) -> list[dict[str, float]]:
    """Compute over both processes twice, so that the state after gathering is seen to be the one before."""
    for batch in batches:
        metric.update(*batch)
    first = as_floats(metric.compute())
    metric.update([], [])
    return [first, as_floats(metric.compute())]


def serve(link: Connection, rank: int, meeting: str) -> None:
    """Answer jobs until there are no more."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=300)
    )
    while (job := pickle.loads(link.recv_bytes())) is not None:
        link.send(measure(*job))
    torch.distributed.destroy_process_group()


if __name__ == "__metric_worker__":
    given = globals()
    serve(given["link"], given["rank"], given["meeting"])
