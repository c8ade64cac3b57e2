"""What the command line adds to a training: a bar, a line of scores, the saved mixture, a file of predictions."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console
from safetensors import SafetensorError

from moadapt.ranks.allocator import ranks_of
from moadapt.reporting.ranks import save_rank_picture
from moadapt.training import MixtureModule
from moadapt.training.run_bar import RunBar
from moadapt.training.run_failed import RunFailed


def progress_bars() -> list[Callback]:
    """Return a progress bar where somebody can see it."""
    return [RunBar()] if sys.stderr.isatty() and sys.stdout.isatty() else []


_OF_PARTS = re.compile(r"loss/|routing/.*/|gradient/|contribution/|effective_rank/")


class ShowScores(Callback):
    """Prints one line of scores after each validation; what is told of single places is left to the log."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print it."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            found = {n: float(v) for n, v in trainer.callback_metrics.items() if n == "score" or "/" in n}
            scores = [f"{name} {value:.4f}" for name, value in found.items() if not _OF_PARTS.match(name)]
            Console().print(f"step {trainer.global_step}: {', '.join(scores)}", highlight=False)


class SaveMixture(Callback):
    """Saves the trained mixture when training ends, with a picture beside it where ranks differ: `ranks.png`.

    Args:
        folder: Made or replaced as a whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save it, on the first process.

        Raises:
            RunFailed: It cannot be written; what was there before is whole.
        """
        if trainer.is_global_zero and isinstance(pl_module, MixtureModule):
            mixture = pl_module.finish()
            try:
                mixture.save(self.folder)
            except (OSError, SafetensorError) as error:
                raise RunFailed(
                    f"the training is done and kept, but the mixture could not be written to {self.folder}: {error}; "
                    "free space there, and the same command writes it without training again"
                ) from error
            Console().print(f"The mixture is in {self.folder}", highlight=False)
            if any(len(set(own.values())) > 1 for own in ranks_of(mixture.spec, mixture.anatomy).values()):
                save_rank_picture(mixture.spec, mixture.anatomy, self.folder.with_name("ranks.png"))


class WritePredictions(BasePredictionWriter):
    """Writes one JSON object a row; each of several processes writes a file of its own.

    Args:
        folder: Where `predictions.jsonl` goes.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__("batch")
        self.folder = folder

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start an empty file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._fresh(trainer).write_text("")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Add the rows of a batch."""
        with self._fresh(trainer).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the whole file its name."""
        self._fresh(trainer).replace(self._file(trainer))
        Console().print(f"The predictions are in {self._file(trainer)}", highlight=False)

    def _file(self, trainer: Trainer) -> Path:
        own = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        return self.folder / f"predictions{own}.jsonl"

    def _fresh(self, trainer: Trainer) -> Path:
        file = self._file(trainer)
        return file.with_name(f".{file.name}")
