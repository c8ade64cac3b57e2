"""Runs that can be stopped: `last.ckpt` is written now and then, at the end, and when a signal asks to stop.

On a stop signal, to whichever process, the current step is finished on all of them, the checkpoint written and
`Stopped` raised; after the last step of an epoch one more step is taken first. More of them change nothing, as
launchers and schedulers may both send one, but Ctrl-C after another acts at once. Where validation was due or under
way, the resumed run starts it afresh.

A checkpoint that cannot be written, say on a full disk, leaves the earlier ones as they are: the run goes on, and tries
again when the next one is due. Where it is the last of the run or of a stop, that is an error.
"""

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moadapt.stop_signals import STOP_SIGNALS
from moadapt.training.kept import Kept
from moadapt.training.run_failed import RunFailed

_LOG = logging.getLogger(__name__)
_AGAIN = "free space there, and the same command goes on from the last checkpoint that was kept"


class Stopped(Exception):
    """A signal asked to stop; everything is saved.

    Args:
        file: The checkpoint to resume from.
        number: The signal.
        process: Index of this process.
    """

    def __init__(self, file: Path, number: int, process: int = 0) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {file} holds the state")
        self.file, self.number, self.process = file, number, process


class KeepLast(Callback):
    """Keeps `last.ckpt` up to date, and stops in good order.

    Args:
        folder: Where to write it; one that all machines share.
        every_n_steps: Steps between two writes.
        keep: How many checkpoints are kept, see `Kept`.

    Raises:
        ValueError: A number is below 1.
    """

    def __init__(self, folder: str | Path, every_n_steps: int = 200, keep: int = 2) -> None:
        if every_n_steps < 1:
            raise ValueError(f"a checkpoint is to be written every {every_n_steps} steps; give at least 1")
        self.every_n_steps, self._kept = every_n_steps, Kept(Path(folder), keep)
        self._asked = 0
        self._listening = self._in_validation = False
        self._due = False
        self._step = -1
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals."""
        if trainer.is_global_zero:
            self._kept.start(None if trainer.ckpt_path is None else Path(trainer.ckpt_path))
        self._asked, self._due, self._step = 0, False, trainer.global_step
        self._listening, self._in_validation = True, False
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

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
        """Write the last checkpoint of all.

        Raises:
            RunFailed: It cannot be written.
        """
        self._listening = False
        problem = self._write(trainer)
        if problem is not None:
            raise RunFailed(f"the training is done, but {problem}; {_AGAIN}")

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
        self._asked = self._asked or number
        signal.signal(signal.SIGINT, self._handlers[signal.SIGINT])

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
            problem = self._write(trainer)
            if problem is not None and trainer.is_global_zero:
                _LOG.warning("%s; the run goes on, and tries again in %d steps", problem, self.every_n_steps)

    def _stop(self, trainer: Trainer) -> None:
        asked = torch.tensor(self._asked, device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(asked, reduce_op="max"))
        problem = self._write(trainer)
        if problem is not None:
            raise RunFailed(f"{signal.Signals(number).name} asked to stop, but {problem}; {_AGAIN}")
        raise Stopped(self._kept.files[0], number, trainer.global_rank)

    def _write(self, trainer: Trainer) -> str | None:
        """Write a checkpoint, on the first process; return what went wrong, on all of them."""
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        problem = None
        if trainer.is_global_zero:
            try:
                self._kept.write(checkpoint)
            except OSError as error:
                problem = (
                    f"step {trainer.global_step} could not be kept in {self._kept.files[0]}: {error.strerror}. What "
                    "was kept before is whole"
                )
        told: str | None = trainer.strategy.broadcast(problem)
        return told


def _owes_validation(trainer: Trainer) -> bool:
    """Tell whether the step that ends now is followed by a validation."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    counts: Any = loop.batch_progress.total
    ends = counts.completed < counts.processed
    return ends and fetcher is not None and loop._should_check_val_fx(fetcher)
