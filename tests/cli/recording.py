"""Commands in processes of their own that write down, step by step, what they train on."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from moadapt.cli import main


class Recording(Callback):
    """Adds a line for each step to `RANK.jsonl` in the folder that the variable `RECORD` names."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        line = {
            "pid": os.getpid(),
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "rows": batch.rows.tolist(),
        }
        with (Path(os.environ["RECORD"]) / f"{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def fit(config: Path, record: Path) -> None:
    """Run `moadapt fit` in this process, to its end."""
    os.environ["RECORD"] = str(record)
    output = os.open(record / "output.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.exit(main(["fit", "-c", str(config)]))
