"""Training one run of the demonstration: resumable, and reused where it is finished."""

import json
import time
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from moadapt.training import KeepLast, MixedTasks
from moadapt.training.kept import LAST, fault, listed, newest, read_checkpoint
from moadapt.training.module import TaskModule
from moadapt.training.run_bar import RunBar
from moadapt.whole_files import write_whole

_DONE = "done.json"


class LossRecord(Callback):
    """Keeps the losses of every step and the seconds spent, also through an interruption."""

    def __init__(self) -> None:
        self.losses: dict[str, list[tuple[int, float]]] = {"all": []}
        self.seconds = 0.0
        self._since = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the losses of the step, which is there before the module logs it."""
        assert isinstance(pl_module, TaskModule), "the demonstration trains modules of tasks"
        losses, counts = pl_module.task_sums.tolist()
        told = {"all": sum(losses) / sum(counts)}
        told |= {
            name: loss / count for name, loss, count in zip(pl_module.data.tasks, losses, counts, strict=True) if count
        }
        for name, value in told.items():
            self.losses.setdefault(name, []).append((trainer.global_step, value))

    def state_dict(self) -> dict[str, Any]:
        """Return losses and seconds."""
        return {"losses": self.losses, "seconds": self.spent()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.losses, self.seconds = state_dict["losses"], state_dict["seconds"]

    def spent(self) -> float:
        """Seconds of training, over all sittings."""
        return self.seconds + time.monotonic() - self._since


def train_run(
    name: str,
    module: TaskModule,
    data: MixedTasks,
    key: dict[str, Any],
    steps: int,
    folder: Path,
    validate_every: int | None = None,
) -> dict[str, Any]:
    """Train a run, or load it where it was trained with the same settings.

    Args:
        name: What to call it on the screen.
        module: What to train; holds the trained weights afterwards.
        data: The rows.
        key: Settings that the result depends on.
        steps: How many steps.
        folder: Checkpoints and logs.
        validate_every: Steps between validations; None leaves them out.

    Returns:
        `losses` by task and in all, and `seconds`.
    """
    done = folder / _DONE
    if done.is_file() and json.loads(done.read_text()).get("key") == key and fault(folder / LAST) is None:
        module.configure_model()
        module.load_state_dict(read_checkpoint(folder / LAST)["state_dict"])
        found: dict[str, Any] = json.loads(done.read_text())
        return found
    started = folder / "key.json"
    same = started.is_file() and json.loads(started.read_text()) == key
    if not same:  # what other settings left here must never pass for this run's
        for file in (done, *listed(folder)):
            file.unlink(missing_ok=True)
    write_json(started, key)
    record = LossRecord()
    lightning.seed_everything(key["seed"], verbose=False)
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=[record, KeepLast(folder, every_n_steps=50), RunBar(name)],
        logger=TensorBoardLogger(folder.parent / "tensorboard", name=name, version=""),
        log_every_n_steps=10,
        limit_val_batches=0 if validate_every is None else None,
        val_check_interval=validate_every,
        check_val_every_n_epoch=1 if validate_every is None else None,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=newest(folder), weights_only=True)
    result = {"key": key, "losses": record.losses, "seconds": record.spent()}
    write_json(done, result)
    return result


def write_json(file: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_whole(file, json.dumps(value, indent=1).encode())
