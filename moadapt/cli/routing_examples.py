"""A few rows of the data as a saved mixture routes them, token by token where its router does."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moadapt.image_rows import image_tokens_of
from moadapt.mixture import Mixture
from moadapt.tracing import Observation
from moadapt.training import MixedTasks
from moadapt.training.batch import Batch

_TOKEN_PLACES, _ROW_PLACES = 3, 12


def routing_examples(mixture: Mixture, data: MixedTasks, each: int, *, pass_task: bool) -> list[dict[str, Any]]:
    """Run the mixture on the first validation rows of each task, and return what it gave them.

    Args:
        mixture: In evaluation mode.
        data: Set up for validation.
        each: Rows a task.
        pass_task: Whether the mixture is told the task.

    Returns:
        What the page's coloured inputs are drawn from; nothing for a base that classifies, which has no prompts.
    """
    if data.classes is not None:
        return []
    data.eval_batch_size, data.num_workers = each, 0
    found: dict[str, Batch] = {}
    for batch in data.val_dataloader():
        found.setdefault(batch.task_names[0], batch)
        if len(found) == len(data.tasks):
            break
    batches = [found[name].to(mixture.base.device).cast(mixture.base.dtype) for name in data.tasks]
    return [example for batch in batches for example in _routed(mixture, data, batch, pass_task)]


def _routed(mixture: Mixture, data: MixedTasks, batch: Batch, pass_task: bool) -> list[dict[str, Any]]:
    told = {"task": batch.task_names} if pass_task else {}
    with torch.no_grad(), mixture.observe() as observed:
        mixture(**batch.inputs, **told)
    places = [each for each in _chosen(mixture, observed) if len(each.routing.weights) in (1, len(batch))]
    real = batch.inputs["attention_mask"].bool()
    return [
        {
            "task": batch.task_names[row],
            "images": example.files,
            "prompt": example.prompt,
            "answers": list(example.answers),
            "tokens": _tokens(mixture, data, batch.inputs["input_ids"][row][real[row]]),
            "places": [_place(each, row, real[row]) for each in places],
        }
        for row, example in enumerate(batch.examples)
    ]


def _chosen(mixture: Mixture, observed: Sequence[Observation]) -> list[Observation]:
    """Choose places to show: of each tower a few that route tokens, and some of those that route rows."""
    towers = {place.name: place.tower for place in mixture.places}
    by_token: dict[str, list[Observation]] = {}
    for each in observed:
        if each.routing.per_token:
            by_token.setdefault(towers[each.place], []).append(each)
    by_row = [each for each in observed if not each.routing.per_token]
    few = [each for found in by_token.values() for each in _spread(found, _TOKEN_PLACES)]
    return [*_spread(by_row, _ROW_PLACES), *few]


def _spread(found: Sequence[Observation], most: int) -> list[Observation]:
    """Take so many of them, evenly from the first to the last."""
    if len(found) <= most:
        return list(found)
    return [found[round(index * (len(found) - 1) / (most - 1))] for index in range(most)]


def _place(observed: Observation, row: int, real: Tensor) -> dict[str, Any]:
    weights = observed.routing.dense().float().mean(dim=2)  # (B|1, T|1, E), over the heads of a routing
    own = weights[row if len(weights) > 1 else 0]
    if not observed.routing.per_token:
        return {"name": observed.place, "shares": own[0].tolist()}
    words = observed.seen.prompt is not None
    return {"name": observed.place, "words": words, "weights": (own[real] if words else own).tolist()}


def _tokens(mixture: Mixture, data: MixedTasks, ids: Tensor) -> list[dict[str, Any]]:
    images = image_tokens_of(mixture.base)
    return [{"text": data.tokenizer.decode([token]), "image": token in images} for token in ids.tolist()]
