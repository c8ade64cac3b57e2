"""The loss of a batch: cross-entropy of its answers' tokens, summed row by row."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moadapt.training.batch import IGNORED, Batch


def row_losses(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the summed loss of every row's answer, and how many tokens that answer has.

    Args:
        logits: Of the positions `batch.columns`, (B, C, V).
        batch: Labels and columns.

    Returns:
        Losses in nats (B,), float32 or finer, and counts (B,).
    """
    targets = batch.targets
    told = targets != IGNORED
    exact = logits[told].to(torch.promote_types(logits.dtype, torch.float32))
    tokens = functional.cross_entropy(exact, targets[told], reduction="none")
    rows = told.nonzero()[:, 0]
    return tokens.new_zeros(len(targets)).index_add(0, rows, tokens), told.sum(dim=1)


def answer_logits(model: Any, batch: Batch, keeps: bool, **options: Any) -> Tensor:
    """Run a model and return its logits where the next token is an answer's, (B, C, V); of classes, (B, 1, V).

    Args:
        model: A transformers model, or a mixture.
        batch: The rows.
        keeps: Whether the model's class takes `logits_to_keep`; else all logits are computed and most thrown away.
        options: What else the model takes.
    """
    if batch.classes:
        of_rows: Tensor = model(**batch.inputs, **options).logits
        return of_rows.unsqueeze(1)
    if keeps:
        options["logits_to_keep"] = batch.columns
    logits: Tensor = model(**batch.inputs, use_cache=False, **options).logits
    return logits if keeps else logits[:, batch.columns]
