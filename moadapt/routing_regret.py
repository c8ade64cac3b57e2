"""What it costs that a router and not an oracle chooses the experts: oracle, predicted and worst loss of held-out rows.

After the report that scenario-specific adapter sets of audio-visual speech recognition are judged by: the right set for
each input, the one that was predicted, and a wrong one. Axes: B rows, T tokens, H heads, E experts.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moadapt.answer_losses import answer_losses
from moadapt.merging.calibration import Batch, as_batches
from moadapt.mixture import Mixture
from moadapt.tracing import Observation


@dataclass(frozen=True)
class TaskRegret:
    """How the rows of one task were routed, and what they lost.

    Args:
        task: Its name, which is that of its expert.
        rows: How many rows it has.
        agreement: Share of its rows and places where its expert weighs most, 0 to 1; where no expert weighs anything,
            there is none.
        oracle: Mean loss of a row, with its own expert alone; all losses are per token of the answer, in nats.
        predicted: With the weights of the routers.
        worst: With that one expert alone that loses most, row by row.
    """

    task: str
    rows: int
    agreement: float
    oracle: float
    predicted: float
    worst: float

    @property
    def regret(self) -> float:
        """What the routers lose beyond the oracle; below 0 where blending does better than it."""
        return self.predicted - self.oracle


def routing_regret(mixture: Mixture, batches: Batch | Iterable[Batch]) -> tuple[TaskRegret, ...]:
    """Route held-out rows and compare with what each expert alone would lose.

    It takes as many passes over the rows as there are experts, and one.

    Args:
        mixture: Whose routers, fitted or trained.
        batches: One batch or several of what the mixture takes, with `labels` and `task`; rows the routers have not
            seen.

    Returns:
        One entry for each expert that has rows, in the order of the experts.

    Raises:
        ValueError: A batch has no labels or no tasks, or no row belongs to an expert.
    """
    tables = []
    with mixture.evaluating(), torch.no_grad():
        for batch in as_batches(batches):
            if batch.get("labels") is None or batch.get("task") is None:
                raise ValueError("held-out rows need their answers and tasks; give batches with labels and task")
            tables.append(_table(mixture, batch))
    owners, agreement, predicted, alone = (torch.cat(column) for column in zip(*tables, strict=True))
    found = [
        TaskRegret(
            name,
            int(own.sum()),
            float(agreement[own].mean()),
            float(alone[own, expert].mean()),
            float(predicted[own].mean()),
            float(alone[own].max(dim=1).values.mean()),
        )
        for expert, name in enumerate(mixture.experts)
        if bool((own := owners == expert).any())
    ]
    if not found:
        raise ValueError(f"no row has a task that is named after one of the experts, {', '.join(mixture.experts)}")
    return tuple(found)


def _table(mixture: Mixture, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return each row's expert (B,), agreement (B,), loss as routed (B,), and loss with each expert alone (B, E)."""
    owners = mixture.expert_ids(batch["task"], len(batch["labels"]))
    with mixture.observe() as observed:
        predicted = _losses(mixture, batch)
    alone = []
    for name in mixture.experts:
        with mixture.override({name: 1.0}):
            alone.append(_losses(mixture, batch))
    return owners.cpu(), _agreement(observed, owners).cpu(), predicted, torch.stack(alone, dim=1)


def _agreement(observed: list[Observation], owners: Tensor) -> Tensor:
    """Return the share of places where a row's own expert weighs most, (B,); of places whose rows are the batch's."""
    shares = []
    for each in observed:
        weights = each.routing.dense().float()
        counted = torch.ones_like(weights[..., :1])
        if each.routing.per_token and each.seen.prompt is not None:
            counted = each.seen.prompt[:, :, None, None].to(weights)
        weights = (weights * counted).sum(dim=(1, 2))
        if len(weights) in (1, len(owners)):
            weights = weights.expand(len(owners), -1)
            shares.append((weights.argmax(-1) == owners) & weights.any(dim=-1))
    return torch.stack(shares).float().mean(dim=0)


def _losses(mixture: Mixture, batch: Batch) -> Tensor:
    """Return the mean loss of each row's answer tokens, on the CPU, (B,)."""
    losses, counts = answer_losses(mixture, batch)
    return (losses / counts.clamp(min=1)).cpu()
