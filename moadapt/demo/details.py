"""From trained runs and evaluations to the two files a demonstration leaves: the summary and the report's details."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig

from moadapt.adapters import LoRA
from moadapt.demo.evaluation import Evaluation
from moadapt.demo.settings import MIXTURE
from moadapt.merging import MergeReport
from moadapt.mixture import Mixture
from moadapt.task import Example
from moadapt.training import MixedTasks, MixtureModule, PeftModule
from moadapt.training.batch import Batch
from moadapt.training.module import TaskModule

_SHOWN = 8
_SUMMARY_NAMES = {"bleu_4": "bleu4"}


def summary_row(name: str, parameters: int, ratio: float | None, found: Evaluation) -> dict[str, Any]:
    """Return one row of the summary.

    Args:
        name: Name of the row.
        parameters: How many were trained.
        ratio: Step time over the base's; None where nothing was trained.
        found: Its evaluation.
    """
    row: dict[str, Any] = {"name": name, "trainable_parameters": parameters, "step_ratio": ratio}
    for score, value in found["scores"].items():
        task, _, metric = score.partition("/")
        if metric:
            row.setdefault(task, {})[_SUMMARY_NAMES.get(metric, metric)] = value
    return row


def parameters_of(name: str, module: TaskModule) -> dict[str, Any]:
    """Count a run's trained parameters by what they are."""
    counts = {"shared": 0, "expert": 0, "router": 0}
    other = 0
    for parameter, role in module.roles().items():
        if role.kind in counts:
            counts[role.kind] += parameter.numel()
        else:
            other += parameter.numel()
    ranks: dict[str, int] = {}
    if isinstance(module, MixtureModule):
        adapters = module.mixture.spec.adapters()
        ranks = {a.name: a.spec.rank for a in adapters if isinstance(a.spec, LoRA)}
    elif isinstance(module, PeftModule) and isinstance(module.peft_config, LoraConfig):
        ranks = {"lora": module.peft_config.r}
    named = {"shared": counts["shared"], "experts": counts["expert"], "router": counts["router"], "other": other}
    return {"run": name, **named, "ranks": ranks}


def routing_table(mixture: Mixture, batches: Sequence[Batch]) -> dict[str, Any]:
    """Average the routing per place and task.

    Args:
        mixture: Evaluated without gradient.
        batches: Prompts, one task a batch.
    """
    sums: dict[str, dict[str, list[torch.Tensor]]] = {}
    for batch in batches:
        with torch.no_grad(), mixture.trace() as trace:
            mixture(**batch.inputs)
        for place, routings in trace.routings.items():
            rows = sums.setdefault(place, {}).setdefault(batch.task_names[0], [])
            rows += [weights.flatten(0, 2) for weights in routings]
    tasks = list(dict.fromkeys(batch.task_names[0] for batch in batches))
    weights = [[torch.cat(sums[place][task]).mean(dim=0).tolist() for task in tasks] for place in sums]
    return {"experts": list(mixture.experts), "places": list(sums), "tasks": tasks, "weights": weights}


def merge_record(row: str, report: MergeReport) -> dict[str, Any]:
    """Return a merge report as the page wants it."""
    return {
        "row": row,
        "method": report.method,
        "task": ", ".join(report.tasks) or None,
        "exact": report.exact,
        "sites": report.errors,
        "output_kl": report.output_kl,
        "top1": report.top1,
        "held_out": report.held_out,
        "rows": report.rows,
    }


def shown_examples(data: MixedTasks, evaluations: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """Choose rows to show, half of them answered wrongly by the mixture where there are so many.

    Args:
        data: The rows.
        evaluations: By row name; all answered the same rows in the same order.
    """
    examples = data.examples("test")
    answered = {name: {a["row"]: a for a in found["answers"]} for name, found in evaluations.items()}
    chosen = []
    for task in data.tasks:
        rows = [row for row, answer in answered[MIXTURE].items() if answer["task"] == task]
        wrong = [row for row in rows if _right(answered[MIXTURE][row], examples[row], data) is False]
        right = [row for row in rows if row not in set(wrong)]
        few = wrong[: _SHOWN // 2]
        chosen += sorted([*few, *right[: _SHOWN - len(few)]])
    return [_example(row, examples[row], data, answered) for row in chosen]


def _example(row: int, example: Example, data: MixedTasks, answered: Mapping[str, Mapping[int, Any]]) -> dict[str, Any]:
    reference = example.reference
    has_box = isinstance(reference, tuple) and len(reference) == 4 and not isinstance(reference[0], str)
    predictions = {}
    for name, answers in answered.items():
        answer = answers[row]
        box = answer["prediction"] if has_box else None
        predictions[name] = {"text": answer["text"], "right": _right(answer, example, data), "box": box}
    return {
        "task": answered[MIXTURE][row]["task"],
        "images": example.files,
        "prompt": example.prompt,
        "references": list(dict.fromkeys(example.answers)),
        "box": list(reference) if has_box else None,
        "predictions": predictions,
    }


def _right(answer: Mapping[str, Any], example: Example, data: MixedTasks) -> bool | None:
    """Judge one answer by its task's own metric; None where one row has no right or wrong."""
    task = data.tasks[answer["task"]]
    if task.primary != "accuracy":
        return None
    metric = next(iter(task.metrics().values()))
    metric.update([answer["prediction"]], [example.reference])
    value = metric.compute()
    score = value[task.primary] if isinstance(value, dict) else value
    return bool(score >= 0.5)
