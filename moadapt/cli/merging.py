"""`moadapt merge`: a saved mixture as one plain model or one LoRA, with a report and a page of how far it is off."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedModel

from moadapt.attaching import load
from moadapt.bases import load_base
from moadapt.cli.routing import as_given, data_module
from moadapt.cli.spelled import part_of
from moadapt.demo.evaluation import answer_all
from moadapt.demo.plain import PlainModule
from moadapt.fresh_folder import fresh_folder
from moadapt.merging import MergeReport
from moadapt.merging.method import MergeMethod
from moadapt.merging.streaming import merge_stored
from moadapt.mixture import Mixture
from moadapt.registry import MERGES
from moadapt.reporting.merge_page import write_merge_page
from moadapt.storage import base_name
from moadapt.training import MixedTasks


def merge(
    mixture: str,
    method: str,
    out: str | None = None,
    data: str | None = None,
    tasks: list[str] | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    peft: bool = False,
    score: bool = False,
    stream: bool = False,
    shard_size: str = "1GB",
    dtype: str | None = None,
    base: str | None = None,
    batches: int = 8,
    batch_size: int = 32,
    seed: int = 0,
    quantize: str | None = None,
) -> None:
    """Fold a saved mixture into one plain model, or into one LoRA, and tell how far that is from the mixture.

    Beside the folder it writes FOLDER.report.json and FOLDER.report.html.

    Args:
        mixture: Folder of a saved mixture.
        method: Short name of a merge method, or its fields: '{name: ties, density: 0.1}'.
        out: Folder for the model or the LoRA, to be made.
        data: Rows to merge by and to measure on: a file that `moadapt fit -c` takes, whose data count; or a data set,
            by short name or by its fields.
        tasks: Tasks that the merge serves: '[vqa, captioning]'; by default all.
        rank: To which every change is cut.
        max_error: Refuse, and write nothing, where a site's relative error is larger.
        peft: Write a LoRA of the peft library instead of a model.
        score: Answer the test rows before and after, and tell both scores.
        stream: Merge from files to files, for bases that do not fit into memory; for methods that look at no rows.
        shard_size: Most that one file of a streamed merge takes, which memory must hold.
        dtype: Number type of the model: `float32`, `bfloat16` or `float16`; by default the base's.
        base: A registered short name, a folder or a hub name; by default the one that the mixture names.
        batches: How many batches of training rows to look at; every second one is kept to measure on.
        batch_size: Rows of a batch.
        seed: Of the order of training rows.
        quantize: How the base was quantised when the mixture was trained: `int8`, `int4`, `nf4` or `llm_int8`.

    Raises:
        MergeRefusedError: A site's error passes the bound.
        ValueError: Something is missing or unknown, or options do not fit each other.
    """
    if out is None:
        raise ValueError("merge needs a folder to write; give --out")
    if Path(out).exists():
        raise ValueError(f"{out} exists already; give the path of a folder to be made")
    if score and (data is None or peft):
        raise ValueError("scores are those of a model on test rows; give --data, and leave --peft out")
    if stream and (peft or data is not None or quantize is not None):
        raise ValueError(
            "a streamed merge looks at no rows and writes a model; leave --data, --peft and --quantize out"
        )
    chosen: MergeMethod = part_of(method, MERGES)
    options: dict[str, Any] = {"tasks": tasks, "rank": rank, "max_error": max_error}
    if not peft:
        options["dtype"] = None if dtype is None else _type(dtype)
    name = base or base_name(Path(mixture))
    if stream:
        report = _streamed(mixture, name, out, chosen, shard_size, options)
    else:
        model, processor = load_base(name, quantize=quantize)
        model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
        rows = None if data is None else data_module(data, name, batch_size, seed)
        report = _merged(load(mixture, model).eval(), processor, chosen, Path(out), rows, batches, options, peft, score)
    Path(f"{out}.report.json").write_text(report.to_json() + "\n")
    write_merge_page(json.loads(report.to_json()), Path(f"{out}.report.html"), title=f"moadapt merge: {Path(out).name}")
    Console().print(_told(report))
    Console().print(f"{out}; how far it is off, site by site: {out}.report.html", highlight=False)


def _merged(
    mixture: Mixture,
    processor: Any,
    method: MergeMethod,
    out: Path,
    rows: MixedTasks | None,
    batches: int,
    options: dict[str, Any],
    peft: bool,
    score: bool,
) -> MergeReport:
    """Merge in memory and write what comes out."""
    if rows is not None:
        rows.prepare_data()
        rows.setup("fit")
        options["calibration"] = list(as_given(islice(rows.first_batches(batches), batches), mixture))
    if peft:
        return mixture.export_peft(out, method=method, **options)
    model, report = mixture.merge(method, **options)
    if score:
        assert rows is not None, "checked before"
        report = _scored(mixture, model, rows, report)
    with fresh_folder(out, ()) as new:
        model.save_pretrained(new)
        processor.save_pretrained(new)
    return report


def _scored(mixture: Mixture, model: PreTrainedModel, rows: MixedTasks, report: MergeReport) -> MergeReport:
    """Return a report with the scores of both on test rows."""
    rows.setup("predict")
    found = {}
    answering: dict[str, Mixture | PreTrainedModel] = {"before": mixture, "after": model}
    for when, answers in answering.items():
        module = PlainModule(dict.fromkeys(rows.tasks, answers))
        found[when] = answer_all(module, rows, when)["scores"]
    return replace(report, before=found["before"], after=found["after"])


def _streamed(
    mixture: str, base: str, out: str, method: MergeMethod, shard_size: str, options: dict[str, Any]
) -> MergeReport:
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        shown = bar.add_task("merging", total=None)
        return merge_stored(
            mixture,
            base,
            out,
            method,
            shard_size=shard_size,
            progress=lambda done, whole: bar.update(shown, completed=done, total=whole),
            **options,
        )


def _type(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {name!r}; give float32, bfloat16 or float16")
    return found


def _told(report: MergeReport) -> Table:
    served = ", ".join(report.tasks) or "all tasks"
    table = Table(title=f"{report.method} for {served}", title_justify="left", show_header=False)
    table.add_row("exact", f"{'yes' if report.exact else 'no'}: {report.why}")
    parts = {"sites": report.sites, "outputs of sites": report.outputs, "outputs, other rows": report.held_out_outputs}
    for name, errors in parts.items():
        if errors:
            worst = max(errors, key=lambda path: errors[path])
            table.add_row(f"error of {name}", f"mean {fmean(errors.values()):.3f}, most {errors[worst]:.3f} at {worst}")
    if report.output_kl is not None and report.top1 is not None:
        seen = "other rows" if report.held_out else "the same rows"
        table.add_row("predictions", f"{report.output_kl:.4f} nats apart, {report.top1:.1%} the same, on {seen}")
    if report.rank is not None and report.curve:
        left = report.curve[min(report.rank, len(report.curve) - 1)]
        table.add_row(f"left out by rank {report.rank}", f"{left:.3f} of the changes")
    for score, before in report.before.items():
        table.add_row(score, f"{before:.3f} before, {report.after[score]:.3f} after")
    return table
