"""From generated text to scores, task by task."""

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchmetrics import Metric, SumMetric

from moadapt.task import Example, Task

MEAN = "score"


@dataclass(frozen=True)
class Answered:
    """A row that was asked.

    Args:
        task: Name of its task.
        row: Its index in the split.
        example: The row itself.
        text: What the model wrote.
        prediction: What the task makes of it.
    """

    task: str
    row: int
    example: Example
    text: str
    prediction: Any

    def record(self) -> dict[str, Any]:
        """Return it as values that JSON holds."""
        asked = {"task": self.task, "row": self.row, "images": self.example.files, "prompt": self.example.prompt}
        return {**asked, "text": self.text, "prediction": self.prediction, "reference": self.example.reference}


class Scores:
    """The metrics of several tasks over one pass of evaluation.

    Args:
        tasks: Tasks by name.
        device: Where metrics are reduced over processes.
    """

    def __init__(self, tasks: Mapping[str, Task], device: torch.device) -> None:
        self._tasks = tasks
        self._metrics = {name: {m: x.to(device) for m, x in task.metrics().items()} for name, task in tasks.items()}
        self._counts = {name: SumMetric().to(device) for name in tasks}
        for count in self._counts.values():
            count.update(0)  # a process may get no row of a task

    def update(self, answered: Sequence[Answered]) -> None:
        """Count rows, of any tasks."""
        by_task: dict[str, list[Answered]] = defaultdict(list)
        for row in answered:
            by_task[row.task].append(row)
        for task, rows in by_task.items():
            self._counts[task].update(len(rows))
            for metric in self._metrics[task].values():
                metric.update([row.prediction for row in rows], [row.example.reference for row in rows])

    def compute(self) -> dict[str, float]:
        """Return every `<task>/<score>`, and as `score` the mean of the tasks' primary scores.

        Tasks without rows are left out.
        """
        found: dict[str, float] = {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The ``compute`` method", UserWarning)  # rows of other processes count
            for name, metrics in self._metrics.items():
                if float(self._counts[name].compute()) > 0:
                    for metric, instance in metrics.items():
                        found |= {f"{name}/{key}": float(x) for key, x in _named(metric, instance).items()}
        primary = [f"{name}/{task.primary}" for name, task in self._tasks.items()]
        scored = [found[name] for name in primary if name in found]
        return found | ({MEAN: sum(scored) / len(scored)} if scored else {})


def _named(name: str, metric: Metric) -> dict[str, Any]:
    value = metric.compute()
    return value if isinstance(value, dict) else {name: value}
