"""`moadapt demo`: train, merge and compare on data that makes itself, and leave a table, a summary and a page."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moadapt.demo.settings import DemoSettings

_DEFAULT = DemoSettings()
_SCORES = {
    "VQA accuracy": ("vqa", "accuracy"),
    "CIDEr-D": ("captioning", "cider_d"),
    "BLEU-4": ("captioning", "bleu4"),
    "ROUGE-L": ("captioning", "rouge_l"),
    "box accuracy": ("grounding", "accuracy"),
    "mean IoU": ("grounding", "mean_iou"),
}


def demo(
    out: str = "runs/demo",
    seed: int = _DEFAULT.seed,
    base: str = _DEFAULT.base,
    data: str = _DEFAULT.data,
    steps: int = _DEFAULT.steps,
    batch_size: int = _DEFAULT.batch_size,
    router: str = _DEFAULT.router,
    learning_rate: float = _DEFAULT.learning_rate,
) -> None:
    """Train one LoRA, a LoRA a task and a routed mixture on the same rows, merge the mixture, and compare.

    A second call with the same settings reuses what is there; after Ctrl-C it goes on where it stopped.

    Args:
        out: Folder for checkpoints, answers, `summary.json` and `report.html`.
        seed: Of data order, adapters and routers.
        base: A registered short name, a folder or a hub name.
        data: Short name of a data set with its own tasks.
        steps: Training steps of every run.
        batch_size: Rows of a step, all tasks mixed.
        router: Short name of the mixture's router.
        learning_rate: Peak rate of the adapters.
    """
    from moadapt.demo.running import run_demo

    given: dict[str, Any] = {
        "seed": seed,
        "base": base,
        "data": data,
        "steps": steps,
        "batch_size": batch_size,
        "router": router,
        "learning_rate": learning_rate,
    }
    summary = run_demo(DemoSettings(**given), Path(out), _command(given | {"out": out}))
    Console().print(_table(summary))
    Console().print(f"{summary['seconds']:.0f} seconds; {out}/summary.json, {out}/report.html")


def _command(given: dict[str, Any]) -> str:
    defaults = {field.name: field.default for field in fields(DemoSettings)} | {"out": "runs/demo"}
    changed = [f"--{name} {value}" for name, value in given.items() if value != defaults[name]]
    return " ".join(["moadapt demo", *changed])


def _table(summary: dict[str, Any]) -> Table:
    table = Table(title="test split: unseen handwriting", title_justify="left")
    table.add_column("row")
    for column in ("trained", "step / base", *_SCORES):
        table.add_column(column, justify="right")
    for row in summary["rows"]:
        ratio = "-" if row["step_ratio"] is None else f"{row['step_ratio']:.2f}"
        scores = [row.get(task, {}).get(score) for task, score in _SCORES.values()]
        shown = ["-" if score is None else f"{score:.3f}" for score in scores]
        table.add_row(row["name"], f"{row['trainable_parameters']:,}", ratio, *shown)
    return table
