"""NLVR's development set through the task `jsonl`: RGBA, three boxes side by side, and statements, true or not.

The authors' folder `nlvr/dev` (github.com/lil-lab/nlvr) holds `dev.json`, one JSON object a line, and `images`.
Published models come a little beyond the majority, and a small one is not expected to; shown is that the files load and
train.
"""

import statistics
from pathlib import Path
from typing import Any

from PIL import Image

from moadapt.adapters import LoRA
from moadapt.demo.evaluation import evaluate
from moadapt.demo.training import train_run, write_json
from moadapt.training import MixtureModule, Optimization
from moadapt_tasks.jsonl import JSONLines
from tests.bench.easy_vqa.mixture import rows_of

STEPS = 150


def prepare(source: Path, out: Path) -> None:
    """Hold every fifth line of `dev.json` out, once.

    Args:
        source: The authors' folder.
        out: Where `train.jsonl` and `test.jsonl` go.
    """
    lines = (source / "dev.json").read_text().splitlines(keepends=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "train.jsonl").write_text("".join(line for i, line in enumerate(lines) if i % 5))
    (out / "test.jsonl").write_text("".join(lines[::5]))


def statements(source: Path, folder: Path) -> JSONLines:
    """Return the task, as a YAML would name it.

    Args:
        source: The authors' folder.
        folder: What `prepare` wrote.
    """
    return JSONLines(
        rows=f"{folder}/{{split}}.jsonl",
        images=[f"{source}/images/{{directory}}/dev-{{identifier}}-0.png"],
        prompt="{sentence}",
        answers="label",
        metric="exact_match",
        max_new_tokens=4,
        splits={"train": "train", "validation": "test", "test": "test"},
    )


def fit(source: Path, folder: Path, base: Path, seed: int, out: Path, steps: int = STEPS) -> dict[str, Any]:
    """Train one LoRA on the statements.

    Args:
        folder: The prepared files.
        base: Folder of the base.
        seed: Of order and adapter.
        out: Folder of the run.
        steps: How many.

    Returns:
        Its record: picture modes, the loss at first and at last, the accuracy and that of the majority.
    """
    data, key = rows_of(base, {"nlvr": statements(source, folder)}, seed), {"seed": seed, "steps": steps}
    module = MixtureModule(
        base=str(base),
        shared=LoRA(rank=8),
        dtype="float32",
        optimization=Optimization(learning_rate=3e-3, warmup=0.05),
        seed=seed,
    )
    losses = [loss for _, loss in train_run("nlvr", module, data, key, steps, out)["losses"]["all"]]
    found, held = evaluate(module, data, key, out / "answers.json"), data.examples("test")
    true = statistics.mean(row.answers == ("true",) for row in held)
    record = {
        **key,
        "modes": sorted({Image.open(file).mode for row in held for file in row.files}),
        "rows": [len(data.examples("train")), len(held)],
        "first_loss": statistics.mean(losses[:10]),
        "last_loss": statistics.mean(losses[-10:]),
        "accuracy": found["scores"]["nlvr/exact_match"],
        "majority": max(true, 1 - true),
    }
    write_json(out / "record.json", record)
    return record
