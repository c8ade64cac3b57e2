"""What `moadapt fit` leaves in its folder, read back."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from moadapt.training.routing_log import FILE as ROUTING

Points = list[list[float]]
"""Pairs of step and value."""
_OF_PLACE = re.compile(r"routing/(?:(?P<place>.+)/)?(?P<measure>[^/]+)")
_NO_SCORE = ("loss", "objective/", "routing/", "overlap/", "gate/", "epoch", "step")


class RunFolder:
    """A run's folder.

    Args:
        path: `trainer.default_root_dir` of the run.

    Raises:
        ValueError: It holds no run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = path / "config.yaml"
        if not file.is_file():
            raise ValueError(f"{path} holds no run, as there is no {file}; give the folder that `moadapt fit` wrote")
        self.config: dict[str, Any] = yaml.safe_load(file.read_text())
        self._points = self._read_points()

    @property
    def mixture(self) -> Path | None:
        """Folder of the saved mixture, None where the fit has not come to its end."""
        folder = self.path / "mixture"
        return folder if folder.is_dir() else None

    @property
    def record(self) -> dict[str, Any]:
        """The measures of the last validation, empty where there are none."""
        file = self.path / ROUTING
        found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        return found

    @property
    def predictions(self) -> list[dict[str, Any]]:
        """The answers of all processes, empty where there are none."""
        files = sorted(self.path.glob("predictions*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    @property
    def losses(self) -> dict[str, Points]:
        """The loss by task, and under `all` that of all tasks."""
        named = {"all": self._points.get("loss", [])}
        named |= {n.removeprefix("loss/"): points for n, points in self._points.items() if n.startswith("loss/")}
        return {name: points for name, points in named.items() if points}

    @property
    def objectives(self) -> dict[str, Points]:
        """Values of the objectives."""
        start = "objective/"
        return {n.removeprefix(start): points for n, points in self._points.items() if n.startswith(start)}

    @property
    def measures(self) -> dict[str, dict[str, Points]]:
        """By measure, points by place; the mean over places under an empty name."""
        found: dict[str, dict[str, Points]] = {}
        for name, points in self._points.items():
            told = _OF_PLACE.fullmatch(name)
            if told is not None:
                found.setdefault(told["measure"], {})[told["place"] or ""] = points
        return found

    @property
    def scores(self) -> dict[str, float]:
        """The scores of the last validation."""
        ended = {n: points[-1][1] for n, points in self._points.items() if not n.startswith(_NO_SCORE)}
        return ended if "score" in ended else {}

    @property
    def steps(self) -> int:
        """How far the training came, in steps, as the log tells, whose first step is 0."""
        return int(max((points[-1][0] + 1 for points in self._points.values()), default=0))

    def _read_points(self) -> dict[str, Points]:
        """Read the log of every start; what a later one tells of a step replaces what an earlier one told."""
        found: dict[str, dict[float, float]] = {}
        for row in self._rows():
            step = row.get("step")
            for name, value in row.items():
                if step and value and name not in ("step", "epoch"):
                    found.setdefault(name, {})[float(step)] = float(value)
        return {name: [[step, values[step]] for step in sorted(values)] for name, values in found.items()}

    def _rows(self) -> Iterator[dict[str, str]]:
        files = sorted((self.path / "csv").glob("version_*/metrics.csv"), key=lambda file: _number(file.parent.name))
        for file in files:
            with file.open(newline="") as lines:
                yield from csv.DictReader(lines)


def _number(name: str) -> int:
    digits = name.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1
