"""The demonstration from start to end; every stage is kept on disk and reused."""

import hashlib
import json
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from moadapt import __version__
from moadapt.bases import load_base
from moadapt.demo.details import (
    merge_record,
    parameters_of,
    routing_table,
    shown_examples,
    summary_row,
)
from moadapt.demo.evaluation import evaluate
from moadapt.demo.plain import PlainModule
from moadapt.demo.settings import MIXTURE, DemoSettings
from moadapt.demo.step_ratio import step_ratios
from moadapt.demo.training import train_run, write_json
from moadapt.fingerprint import fingerprint
from moadapt.merging import MergeReport
from moadapt.mixture import Mixture
from moadapt.reporting import write_report
from moadapt.training import MixedTasks, MixtureModule
from moadapt.training.batch import Batch
from moadapt.training.module import TaskModule

_CALIBRATION = 6
_ROUTED = 6


def run_demo(settings: DemoSettings, out: Path, command: str) -> dict[str, Any]:
    """Make the data, train the three runs, merge, compare, and write `summary.json` and `report.html`.

    Args:
        settings: What to train.
        out: Folder of everything the demonstration leaves; a second call there goes on or reuses.
        command: How to run it again, for the report.

    Returns:
        The summary.
    """
    clock = _Clock(out / "seconds.json", settings.key())
    try:
        return _run(settings, out, command, clock)
    except BaseException:
        clock.stop(ended=False)
        raise


def _run(settings: DemoSettings, out: Path, command: str, clock: "_Clock") -> dict[str, Any]:
    data = settings.data_module()
    data.prepare_data()
    data.setup("fit")
    data.setup("predict")
    key = settings.key() | _state(settings, data)
    modules = settings.modules(data.tasks)
    results = {
        name: train_run(name, module, data, key, settings.steps, out / "runs" / name)
        for name, module in modules.items()
    }
    batch = next(iter(data.train_dataloader()))
    ratios = _kept(out / "step_ratios.json", key, lambda: step_ratios(modules, batch))
    mixture = _mixture(modules)
    answering, merges = _answering(settings, mixture, modules, data)
    evaluations = {name: evaluate(m, data, key, out / "answers" / f"{name}.json") for name, m in answering.items()}
    parameters = [parameters_of(name, module) for name, module in modules.items()]
    seconds = clock.stop(ended=True)
    counts = {p["run"]: p["shared"] + p["experts"] + p["router"] + p["other"] for p in parameters}
    rows = [
        summary_row(name, counts.get(name, 0), {"base": 1.0, **ratios}.get(name), found)
        for name, found in evaluations.items()
    ]
    summary = {"seconds": seconds, "seed": settings.seed, "rows": rows}
    write_json(out / "summary.json", summary)
    details = {
        "title": "moadapt demo",
        "command": command,
        "settings": {name: value for name, value in settings.key().items() if not isinstance(value, Mapping)},
        "losses": {name: result["losses"] for name, result in results.items()},
        "routing": routing_table(mixture, list(islice(data.predict_dataloader(), _ROUTED))),
        "parameters": parameters,
        "merges": merges,
        "examples": shown_examples(data, evaluations),
        **summary,
    }
    write_report(details, out / "report.html")
    return summary


def _state(settings: DemoSettings, data: MixedTasks) -> dict[str, str]:
    """Return what results depend on beside the settings: this release, the base's weights and the rows."""
    rows = hashlib.sha256()
    for split in ("train", "test"):
        for example in data.examples(split):
            rows.update(repr((example.prompt, example.answers, example.entry)).encode())
    base, _ = load_base(settings.base)
    return {"release": __version__, "weights": fingerprint(base)["values"], "rows": rows.hexdigest()}


def _answering(
    settings: DemoSettings, mixture: Mixture, modules: Mapping[str, TaskModule], data: MixedTasks
) -> tuple[dict[str, TaskModule], list[dict[str, Any]]]:
    """Return what answers each row of the table, and the reports of the merges among them."""
    base, _ = load_base(settings.base, dtype="float32", attn_implementation="eager")
    calibration = [_told(batch) for batch in islice(data.train_dataloader(), _CALIBRATION)]
    merges: list[dict[str, Any]] = []

    def merged(row: str, method: str, **options: Any) -> Any:
        model, report = mixture.merge(method, calibration=calibration, **options)
        assert isinstance(report, MergeReport), "a merge reports on itself"
        merges.append(merge_record(row, report))
        return model

    per_task = {task: merged("mixture_merged_per_task", "task", task=task) for task in data.tasks}
    everything = merged("mixture_merged", "regression")
    answering: dict[str, TaskModule] = {
        "base": PlainModule(dict.fromkeys(data.tasks, base)),
        **modules,
        "mixture_merged_per_task": PlainModule(per_task),
        "mixture_merged": PlainModule(dict.fromkeys(data.tasks, everything)),
    }
    return answering, merges


def _told(batch: Batch) -> dict[str, Any]:
    """Return a training batch as what a mixture takes."""
    return {**batch.inputs, "labels": batch.labels, "task": list(batch.task_names)}


def _mixture(modules: Mapping[str, TaskModule]) -> Mixture:
    module = modules[MIXTURE]
    assert isinstance(module, MixtureModule), "the mixture's run trains a mixture"
    module.mixture.eval()
    return module.mixture


def _kept(file: Path, key: Mapping[str, Any], make: Any) -> dict[str, float]:
    """Return a stored result of the same settings, or make and store it."""
    if file.is_file() and (found := json.loads(file.read_text())).get("key") == key:
        return dict(found["value"])
    value: dict[str, float] = make()
    write_json(file, {"key": dict(key), "value": value})
    return value


class _Clock:
    """Sums the seconds of all sittings up to the first that ends well.

    Args:
        file: Where they are kept.
        key: Settings they belong to.
    """

    def __init__(self, file: Path, key: Mapping[str, Any]) -> None:
        found = json.loads(file.read_text()) if file.is_file() else {}
        same = found.get("key") == key
        self._file, self._key, self._began = file, dict(key), time.monotonic()
        self._before: float = found["seconds"] if same else 0.0
        self._ended: bool = found["ended"] if same else False

    def stop(self, *, ended: bool) -> float:
        """Return the sum and store it.

        Args:
            ended: Whether the demonstration came to its end.
        """
        seconds: float = self._before + (0.0 if self._ended else time.monotonic() - self._began)
        write_json(self._file, {"key": self._key, "seconds": seconds, "ended": ended or self._ended})
        return seconds
