"""What a mixture loses on the answers of a batch, row by row, as routers are fitted and judged by."""

import torch
from torch import Tensor
from torch.nn import functional

from moadapt.merging.calibration import Batch
from moadapt.mixture import Mixture


def answer_losses(mixture: Mixture, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the summed loss of each row's answer in nats, float32 or finer, and how many tokens it has, (B,) each.

    A class is an answer of one token.

    Args:
        mixture: With whatever routing it has.
        batch: What it takes, with `labels`.

    Raises:
        ValueError: The batch has no labels.
    """
    labels = batch.get("labels")
    if labels is None:
        raise ValueError("the loss of rows needs their answers; give batches with labels")
    logits = mixture(**batch).logits
    if logits.ndim == 2:  # of the classes of rows
        logits, labels = logits.unsqueeze(1), labels.reshape(-1, 1)
    elif not mixture.base.config.is_encoder_decoder:  # there logits are one token ahead
        logits, labels = logits[:, :-1], labels[:, 1:]
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tokens = functional.cross_entropy(exact.mT, labels, ignore_index=-100, reduction="none")
    return tokens.sum(dim=1), (labels != -100).sum(dim=1)
