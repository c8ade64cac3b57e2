"""What a sampler that follows validations is told: the loss or the score of every task."""

from itertools import islice
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.trainer.states import TrainerFn

if TYPE_CHECKING:
    from moadapt.training.module import TaskModule


def follow_validation(module: "TaskModule", scores: dict[str, float]) -> None:
    """Tell the sampler what a validation found, where it asks for it and the validation is part of a training.

    Args:
        module: The module in training, after its validation.
        scores: What `Scores.compute` gave, the same on all processes.
    """
    trainer, data = module.trainer, module.data
    if data.sampler.reads is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
        return
    if data.sampler.reads == "loss":
        found = validation_losses(module)
        for name, loss in found.items():
            module.log(f"validation_loss/{name}", loss)
    else:
        primary = {name: f"{name}/{task.primary}" for name, task in data.tasks.items()}
        found = {name: scores[score] for name, score in primary.items() if score in scores}
    data.follow(found)


@torch.no_grad()
def validation_losses(module: "TaskModule") -> dict[str, float]:
    """Return the mean loss of an answer token for each task that has some in the validation, over all processes.

    Args:
        module: The module, in evaluation mode; of the rows, as many batches are read as a validation takes.
    """
    names = list(module.data.tasks)
    sums = torch.zeros(2, len(names), dtype=torch.float64, device=module.device)
    limit = module.trainer.num_val_batches[0]
    for batch in islice(module.data.answered("validation"), None if limit == float("inf") else int(limit)):
        if not len(batch):
            continue
        with module.trainer.precision_plugin.val_step_context():
            losses, counts = module.losses(batch.to(module.device))
        if not batch.spare:
            index = batch.task_ids(names).to(module.device)
            sums[0].index_add_(0, index, losses.to(sums))
            sums[1].index_add_(0, index, counts.to(sums))
    sums = module.trainer.strategy.reduce(sums, reduce_op="sum")
    return {name: loss / count for name, loss, count in zip(names, *sums.tolist(), strict=True) if count}
