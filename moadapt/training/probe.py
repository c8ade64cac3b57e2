"""Scores sites before anything is trained: how large the gradient of a LoRA is that starts at zero.

Of a term `s up down^T` with `up = 0` only `up` has a gradient, `dL/d up`, whose norm says how much the loss asks for a
change there. It is taken of each task's summed loss over the same batches, of all processes together.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, islice, repeat

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moadapt.ranks.allocator import lora_banks
from moadapt.ranks.gates import Gated, gated_at
from moadapt.training.batch import Batch
from moadapt.training.mixture_module import MixtureModule


class ProbeSites(Callback):
    """Scores every LoRA at every site when a fit would take its first step, and ends the fit there.

    Args:
        batches: How many training batches are read.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.probed: list[Gated] = []
        """Every LoRA at every site; those whose start is taken off are left out."""
        self.scores: dict[str, Tensor] = {}
        """By task a score for each of them, (N,), on the CPU."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score, and ask to stop.

        Raises:
            ValueError: There are no LoRAs to score.
        """
        assert isinstance(pl_module, MixtureModule), "mixtures have LoRAs at sites"
        banks = lora_banks(pl_module.mixture.banks())
        self.probed = [each for site, bank in banks for each in gated_at(site, bank)]
        if not self.probed:
            raise ValueError("a probe needs LoRAs that train and start at zero; this mixture has none")
        self.scores = {
            task: _norms(self.probed, gradients) for task, gradients in self._gradients(trainer, pl_module).items()
        }
        trainer.should_stop = True

    def _gradients(self, trainer: Trainer, module: MixtureModule) -> dict[str, dict[Tensor, Tensor]]:
        """Return by task the gradient of its summed loss for every stack, the same on all processes."""
        stacks = list(dict.fromkeys(stack for each in self.probed for stack in (each.down, each.up)))
        found = {task: [torch.zeros_like(stack) for stack in stacks] for task in module.data.tasks}
        for batch in self._read(module):
            with trainer.precision_plugin.train_step_context():
                losses, _ = module.losses(batch)
            for task in dict.fromkeys(batch.task_names):
                own = losses[[name == task for name in batch.task_names]].sum()
                gradients = torch.autograd.grad(own, stacks, retain_graph=True, allow_unused=True)
                for total, gradient in zip(found[task], gradients, strict=True):
                    if gradient is not None:
                        total += gradient
        reduce = trainer.strategy.reduce
        return {
            task: {stack: reduce(total, reduce_op="sum") for stack, total in zip(stacks, totals, strict=True)}
            for task, totals in found.items()
        }

    def _read(self, module: MixtureModule) -> Iterator[Batch]:
        """Give this process's share of the first batches; the loader goes on in the next epoch where one ends."""
        loader = module.data.train_dataloader()
        return (batch.to(module.device) for batch in islice(chain.from_iterable(repeat(loader)), self.batches))


def _norms(probed: Sequence[Gated], gradients: dict[Tensor, Tensor]) -> Tensor:
    """Return the norm of the gradient of each adapter's `down` and `up` together, (N,)."""
    both = [[gradients[stack][each.rows].double() for stack in (each.down, each.up)] for each in probed]
    return torch.stack([sum((side.square().sum() for side in sides), torch.zeros(())).sqrt().cpu() for sides in both])
