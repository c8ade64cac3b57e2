"""Runs that can be stopped: `last.ckpt` is written now and then, at the end, and when a signal asks to stop.

On SIGINT (Ctrl-C) or SIGTERM the current step is finished on all processes, the checkpoint written and `Stopped`
raised; after the last step of an epoch one more step is taken first. A second signal acts at once. Where validation was
due or under way, the resumed run starts it afresh.
"""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

LAST = "last.ckpt"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A signal asked to stop; everything is saved.

    Args:
        file: The checkpoint to resume from.
        number: The signal.
    """

    def __init__(self, file: Path, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {file} holds the state")
        self.file, self.number = file, number


def read_checkpoint(file: Path, **options: Any) -> dict[str, Any]:
    """Read a checkpoint that Lightning wrote: tensors and plain values.

    Such a file is a pickle, but with `weights_only` nothing in it is run: whatever is no tensor and no plain value is
    an error, so that the file may come from anybody.

    Args:
        file: Such as the `last.ckpt` of a run.
        options: Of `torch.load`, such as `map_location`.
    """
    found: dict[str, Any] = torch.load(file, weights_only=True, **options)
    return found


class KeepLast(Callback):
    """Keeps `last.ckpt` up to date, and stops in good order.

    Args:
        folder: Where to write it.
        every_n_steps: Steps between two writes.
    """

    def __init__(self, folder: str | Path, every_n_steps: int = 200) -> None:
        self.file, self.every_n_steps = Path(folder) / LAST, every_n_steps
        self._asked = 0
        self._listening = self._in_validation = False
        self._due = False
        self._step = -1
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals."""
        self._asked, self._due, self._step = 0, False, trainer.global_step
        self._listening, self._in_validation = True, False
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the checkpoint where it is time, and stop where that is asked."""
        if trainer.global_step == self._step:  # gradients are being accumulated, which no checkpoint holds
            return
        self._step = trainer.global_step
        self._due |= self._step % self.every_n_steps == 0
        if not self._ends_here(trainer):
            self._act(trainer)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Stop where that is asked."""
        if self._listening and self._stop_is_asked(trainer):
            self._in_validation = True
            self._stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last checkpoint of all."""
        self._listening = False
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave signals as they were."""
        self._listening = False
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave signals as they were."""
        self._listening = False
        self._restore()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Where a validation is owed, write so; Lightning would take it for done."""
        if self._in_validation or _owes_validation(trainer):
            loops = checkpoint["loops"]["fit_loop"]
            for counts in (loops["epoch_loop.batch_progress"][name] for name in ("total", "current")):
                counts["completed"] = counts["processed"]
            fresh = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
            started = {**fresh, "ready": 1, "started": 1}
            loops["epoch_loop.val_loop.batch_progress"].update(total=started, current=fresh, is_last_batch=False)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _stop_is_asked(self, trainer: Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(bool(self._asked), all=False)

    def _ends_here(self, trainer: Trainer) -> bool:
        """Tell whether training ends with this step, or an epoch whose closing hooks a resumed run would leave out."""
        if self._step == trainer.max_steps:
            return True
        return trainer.is_last_batch and trainer.num_training_batches > 1 and not _owes_validation(trainer)

    def _act(self, trainer: Trainer) -> None:
        if self._stop_is_asked(trainer):
            self._stop(trainer)
        if self._due:
            self._due = False
            self._write(trainer)

    def _stop(self, trainer: Trainer) -> None:
        self._write(trainer)
        raise Stopped(self.file, self._asked or signal.SIGTERM)

    def _write(self, trainer: Trainer) -> None:
        """Write beside the file and rename, on the first process."""
        fresh = self.file.with_name(f".{self.file.name}")
        trainer.save_checkpoint(fresh)
        if trainer.is_global_zero:
            os.replace(fresh, self.file)
        trainer.strategy.barrier()


def _owes_validation(trainer: Trainer) -> bool:
    """Tell whether the step that ends now is followed by a validation."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    counts: Any = loop.batch_progress.total
    ends = counts.completed < counts.processed
    return ends and fetcher is not None and loop._should_check_val_fx(fetcher)
