"""Logs what the routers do at each validation: numbers for every place, and a file beside the checkpoint."""

import json
import math
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from moadapt import measures
from moadapt.routed import routed_at, with_tasks
from moadapt.tracing import Observation
from moadapt.training.batch import Batch
from moadapt.training.mixture_module import MixtureModule

FILE = "routing.json"
_DRIFT = "drift"
_DIGITS = 6


class LogRouting(Callback):
    """Measures the routing of the prompts that a validation answers.

    Logs `routing/<place>/<measure>` and the mean over places, `routing/<measure>`; writes `routing.json`, which holds
    the tables too. Drift is that from the validation before, and there is none in the first after a start.

    While training, `routing/dropped_in_training` is the share of choices for which an expert had no room, where routers
    choose, in the steps that are logged.

    Args:
        folder: Where the file goes, made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._measures: dict[str, dict[str, Metric]] = {}
        self._before: dict[tuple[str, int], Tensor] = {}
        self._rows: dict[tuple[str, int], Tensor] = {}
        self._watching = ExitStack()
        self._dropped, self._measured_drops = measures.DroppedTokens(), False
        self._batch, self._spare = 0, False
        self._task_ids = torch.empty(0)
        self._tasks: tuple[str, ...] = ()
        self._experts: tuple[str, ...] = ()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Watch what routers drop in a step that is logged."""
        self._spare = batch.spare
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0 and isinstance(pl_module, MixtureModule):
            self._dropped, self._measured_drops = measures.DroppedTokens().to(pl_module.device), True
            self._watching.enter_context(pl_module.mixture.watch(self._note_dropped))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Log it, where routers choose, be it on another process."""
        self._watching.close()
        if self._measured_drops:
            self._measured_drops = False
            if trainer.strategy.reduce_boolean_decision(self._dropped.update_called, all=False):
                pl_module.log("routing/dropped_in_training", _reduced(self._dropped))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start new measures, and watch the routers."""
        if trainer.sanity_checking or not isinstance(pl_module, MixtureModule) or not pl_module.mixture.places:
            return
        self._experts, self._tasks = pl_module.mixture.experts, tuple(pl_module.data.tasks)
        fresh = (_fresh(len(self._tasks), len(self._experts), pl_module.device) for _ in pl_module.mixture.places)
        self._measures = {place.name: found for place, found in zip(pl_module.mixture.places, fresh, strict=True)}
        self._rows = {}
        self._watching.enter_context(pl_module.mixture.watch(self._note))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Remember the tasks of the rows."""
        if self._measures:
            self._batch, self._task_ids, self._spare = batch_idx, batch.task_ids(self._tasks), batch.spare

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop watching; reduce over processes, log and write."""
        self._watching.close()
        if not self._measures:
            return
        found = {place: _values(own) for place, own in self._measures.items()}
        found = {place: values for place, values in found.items() if not bool(values["load"].isnan().any())}
        means = _means(found)
        pl_module.log_dict({f"routing/{name}": value for name, value in {**_numbers(found), **means}.items()})
        if trainer.is_global_zero:
            self._write({"step": trainer.global_step, "means": means, "places": found})
        self._measures, self._before = {}, self._rows

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._watching.close()
        self._measures = {}

    def _note(self, observed: Observation) -> None:
        """Measure one routing of a prompt; what follows the prompt is no input of the data."""
        if observed.continues or self._spare:
            return
        own, place = self._measures[observed.place], observed.place
        routed = routed_at(with_tasks(observed, self._task_ids), self._experts, self._tasks)
        for name, measure in own.items():
            if name != _DRIFT:
                measure.update(routed)
        key = (place, self._batch)
        if key not in self._rows:  # some bases run a tower several times a batch
            rows = self._rows[key] = measures.row_shares(routed, len(observed.routing.weights))
            before = self._before.get(key)
            if before is not None and before.shape == rows.shape:
                own[_DRIFT].update(before, rows)

    def _note_dropped(self, observed: Observation) -> None:
        """Measure the choices of one routing; a dense one chooses nothing."""
        if observed.routing.indices is not None and not self._spare:
            self._dropped.update(routed_at(observed, (), ()).with_answers())

    def _write(self, record: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        named = {"experts": list(self._experts), "tasks": list(self._tasks), **record}
        fresh = self.folder / f".{FILE}"
        fresh.write_text(json.dumps(_plain(named), indent=1) + "\n")
        fresh.replace(self.folder / FILE)


def _fresh(tasks: int, experts: int, device: torch.device) -> dict[str, Metric]:
    """Return the measures of one place, by the names they are logged under."""
    made: dict[str, Metric] = {
        "load": measures.Load(experts),
        "entropy": measures.RoutingEntropy(),
        "effective_experts": measures.EffectiveExperts(),
        "dead_experts": measures.DeadExperts(experts),
        "input_information": measures.InputInformation(experts),
        "task_information": measures.TaskInformation(tasks, experts),
        "dropped": measures.DroppedTokens(),
        _DRIFT: measures.Drift(),
        "load_by_task": measures.TaskLoad(tasks, experts),
        "load_by_modality": measures.ModalityLoad(experts),
    }
    return {name: measure.to(device) for name, measure in made.items()}


def _values(own: dict[str, Metric]) -> dict[str, Tensor]:
    return {name: _reduced(measure).detach().cpu() for name, measure in own.items()}


def _reduced(measure: Metric) -> Tensor:
    """Reduce a measure over all processes; some of these may have had nothing to measure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The ``compute`` method", UserWarning)
        found: Tensor = measure.compute()
        return found


def _numbers(found: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Return the measures of every place that are one number, as `<place>/<measure>`."""
    return {
        f"{place}/{name}": value.item()
        for place, values in found.items()
        for name, value in values.items()
        if value.ndim == 0 and not value.isnan()
    }


def _means(found: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Return the mean over places of each measure that is one number, where any place has one."""
    by_measure: dict[str, list[float]] = {}
    for name, value in _numbers(found).items():
        by_measure.setdefault(name.rpartition("/")[2], []).append(value)
    return {name: sum(values) / len(values) for name, values in by_measure.items()}


def _plain(value: Any) -> Any:
    """Turn tensors into lists, shorten numbers, and write null for what is no number."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, Tensor | list):
        return [_plain(inner) for inner in value] if not isinstance(value, Tensor) else _plain(value.tolist())
    if isinstance(value, float):
        return round(value, _DIGITS) if math.isfinite(value) else None
    return value
