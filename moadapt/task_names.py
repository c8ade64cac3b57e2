"""Names of tasks and experts as indices."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moadapt.router import UNKNOWN_TASK

TaskNames = str | Sequence[str] | Tensor | None


def task_ids(task: str | Sequence[str] | Tensor, tasks: Sequence[str], *, unknown: bool) -> Tensor:
    """Return the index of each row's task, (B,), or of the one task of all rows, (1,).

    Args:
        task: One name, one name a row, or indices.
        tasks: The known names.
        unknown: Whether rows may have another task, whose index is `UNKNOWN_TASK`.

    Raises:
        ValueError: A name is unknown, and the known ones are listed; or indices are no row of integers in range.
    """
    if isinstance(task, Tensor):
        lowest = UNKNOWN_TASK if unknown else 0
        if task.ndim != 1 or task.is_floating_point() or task.dtype == torch.bool:
            raise ValueError(f"task indices are integers of shape (B,), got {task.dtype} of {tuple(task.shape)}")
        if task.numel() and not lowest <= int(task.min()) <= int(task.max()) < len(tasks):
            raise ValueError(f"task indices go from {lowest} to {len(tasks) - 1}, got {task.tolist()}")
        return task.long()
    names = [task] if isinstance(task, str) else task
    if unknown:
        return torch.tensor([tasks.index(name) if name in tasks else UNKNOWN_TASK for name in names], dtype=torch.long)
    return torch.tensor(indices("task", names, tasks), dtype=torch.long)


def indices(what: str, names: Iterable[str], known: Sequence[str]) -> list[int]:
    """Return the places of names among the known ones.

    Args:
        what: What they name, for the message.
        names: Some names.
        known: All names.

    Raises:
        ValueError: Some are unknown.
    """
    names = list(names)
    unknown = sorted({repr(name) for name in names if name not in known})
    if unknown:
        listed = ", ".join(known) or "none, as it has no experts"
        raise ValueError(f"unknown {what} {', '.join(unknown)}; this mixture knows {listed}")
    return [known.index(name) for name in names]
