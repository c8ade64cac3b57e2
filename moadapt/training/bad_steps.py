"""Steps whose loss or gradient is no finite number: skipped on all processes alike, counted, and kept to be looked at.

A skipped step counts as a step of the run: data, schedule and noise go on, while parameters, moments and ranks stay
as they are. Whether to skip is known before anything looks at the gradients, which costs one number from the device a
step; a mixture with experts waits for the device there anyhow, to learn which of them the step used.

Under float16 the scaler of the loss lets gradients overflow now and then, skips such a step itself, and lowers its
scale. Those steps are not counted unless the scale is at 1, and so not to blame.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save
from torch import Tensor

from moadapt.training.batch import Batch
from moadapt.training.module import TaskModule
from moadapt.training.run_failed import RunFailed
from moadapt.whole_files import write_whole

_LOG = logging.getLogger(__name__)
_COUNT = "skipped_steps"


class SkipBadSteps(Callback):
    """Skips steps whose loss or gradient is not finite on some process, and ends a run that has too many.

    The batch of such a step goes to `step-STEP-PROCESS.safetensors` (inputs, labels) and `.json` (rows, tasks, loss);
    each process writes its own, and of several accumulated ones those whose loss is bad, and the last.

    Args:
        folder: For these files.
        limit: How many steps of a run may be bad; one more ends it.

    Raises:
        ValueError: `limit` is negative.
    """

    def __init__(self, folder: str | Path, limit: int = 20) -> None:
        if limit < 0:
            raise ValueError(f"the limit of bad steps is {limit}; give at least 0")
        self.folder, self.limit, self.skipped = Path(folder), limit, 0
        self._losses: list[Tensor] = []
        self._norm = torch.zeros(())
        self._suspects: list[tuple[Batch, float]] = []
        self._is_bad = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what was under way."""
        self._losses, self._suspects, self._is_bad = [], [], False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Take note of this process's share of the loss."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Drop the gradients of a bad step, before anything looks at them."""
        assert isinstance(pl_module, TaskModule), "it skips steps of modules of tasks"
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._norm = torch.nn.utils.get_total_norm(gradients)
        device = self._losses[0].device
        bad = torch.stack([~torch.stack(self._losses).isfinite().all(), ~self._norm.to(device).isfinite()])
        loss, gradient = trainer.strategy.reduce(bad.int(), reduce_op="sum").tolist()
        pl_module.skips = bool(loss or gradient)
        self._is_bad = bool(loss or (gradient and _scale(trainer) <= 1))
        if pl_module.skips:
            optimizer.zero_grad()
        self._losses = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count a bad step and keep its batch.

        Raises:
            RunFailed: There are too many.
        """
        stepped = not self._losses
        if self._is_bad or (not stepped and not self._losses[-1].isfinite()):
            self._suspects.append((batch, float(outputs["loss"])))
        if self._is_bad:
            self.skipped += 1
            self._tell(trainer, trainer.global_step - 1)
            pl_module.log(_COUNT, float(self.skipped))
        if stepped:
            self._suspects, self._is_bad = [], False
        if self.skipped > self.limit:
            raise RunFailed(
                f"{self.skipped} steps had a loss or gradient that is not finite, and the limit is {self.limit}. Look "
                f"at their batches in {self.folder}, lower the learning rate, or take bfloat16 instead of float16; a "
                "higher limit (--max_bad_steps) lets the run go on from its last checkpoint"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write how many steps were skipped, where commands that train nothing do not miss this callback."""
        checkpoint[_COUNT] = self.skipped

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped = checkpoint.get(_COUNT, 0)

    def _tell(self, trainer: Trainer, step: int) -> None:
        """Say what was skipped, and write its batches."""
        try:
            for number, (batch, loss) in enumerate(self._suspects):
                part = f"-{number}" if len(self._suspects) > 1 else ""
                file = self.folder / f"step-{step:06d}-{trainer.global_rank}{part}"
                _write(file, batch, {"step": step, "process": trainer.global_rank, "loss": loss}, float(self._norm))
            kept = f"its batch is in {self.folder}"
        except OSError as error:
            kept = f"its batch could not be kept in {self.folder}: {error.strerror}"
        if trainer.is_global_zero:
            _LOG.warning(
                "step %d is skipped: its loss or gradient is not finite; %s (%d of %d that are allowed)",
                step, kept, self.skipped, self.limit,
            )  # fmt: skip


def _scale(trainer: Trainer) -> float:
    """Return what the loss is multiplied by before the backward pass under float16."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _write(file: Path, batch: Batch, about: dict[str, Any], norm: float) -> None:
    """Write a batch: tensors, and what can be read."""
    tensors = {**batch.inputs, **({} if batch.labels is None else {"labels": batch.labels})}
    content = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    write_whole(file.with_suffix(".safetensors"), content)
    rows = zip(batch.task_names, batch.rows.tolist(), batch.examples, strict=True)
    told = {
        **{name: str(value) if isinstance(value, float) else value for name, value in about.items()},
        "gradient_norm": str(norm),  # JSON knows no NaN
        "rows": [
            {"task": task, "row": row, "entry": example.entry, "images": example.files, "prompt": example.prompt,
             "answers": list(example.answers)}
            for task, row, example in rows
        ],
    }  # fmt: skip
    write_whole(file.with_suffix(".json"), (json.dumps(told, indent=1) + "\n").encode())
