"""Answers and scores of one model on the test split, reused where they are known."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch

from moadapt.demo.training import write_json
from moadapt.training import MixedTasks
from moadapt.training.module import TaskModule
from moadapt.training.run_bar import RunBar
from moadapt.training.scores import Answered, Scores

Evaluation = dict[str, Any]


def evaluate(module: TaskModule, data: MixedTasks, key: Mapping[str, Any], file: Path) -> Evaluation:
    """Answer every test row, greedily, and score the answers.

    Args:
        module: What answers.
        data: The rows.
        key: Settings that the result depends on.
        file: Where the result is kept.

    Returns:
        `scores` by `<task>/<score>`, `answers` in row order, `seconds`.
    """
    if file.is_file():
        found: Evaluation = json.loads(file.read_text())
        if found.get("key") == key:
            return found
    start = time.monotonic()
    found = {"key": dict(key), **answer_all(module, data, file.stem)}
    write_json(file, found | {"seconds": time.monotonic() - start})
    loaded: Evaluation = json.loads(file.read_text())
    return loaded


def answer_all(module: TaskModule, data: MixedTasks, title: str) -> Evaluation:
    """Answer every test row, greedily, and score the answers.

    Args:
        module: What answers.
        data: The rows, set up to predict.
        title: Of the bar on the screen.

    Returns:
        `scores` by `<task>/<score>` and `answers` in row order.
    """
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=1,
        logger=False,
        callbacks=[RunBar(f"{title} answers")],
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    batches = trainer.predict(module, datamodule=data) or []
    answers = [row for rows in batches for row in rows]
    return {"scores": _scores(answers, data), "answers": answers}


def _scores(answers: list[Any], data: MixedTasks) -> dict[str, float]:
    scores = Scores(data.tasks, torch.device("cpu"))
    examples = data.examples("test")
    scores.update([Answered(a["task"], a["row"], examples[a["row"]], a["text"], a["prediction"]) for a in answers])
    return scores.compute()
