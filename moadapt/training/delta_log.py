"""Logs what adapters amount to: how much they add beside the frozen layers, and over how many directions.

The share is `||delta|| / ||W0 x||` at linear sites, over all tokens of a batch; the effective rank of a change of
weights is `exp(H(sigma / sum sigma))` of its singular values (Roy and Vetterli, "The effective rank", 2007).
"""

from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from moadapt.adapted import AdaptedModule
from moadapt.mixture import Mixture
from moadapt.training.batch import Batch
from moadapt.training.mixture_module import MixtureModule


class LogDeltas(Callback):
    """Logs `contribution/<tower>` and the mean over sites of each adapter's `effective_rank/<adapter>`.

    A step that is read runs the frozen linear layers of adapted sites once more, and processes add up their sums once.
    Mixtures that are compiled are read for their effective ranks alone, as hooks would compile them again.

    Args:
        every_n_steps: Steps between two readings, at least 1.

    Raises:
        ValueError: It is below 1.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        if every_n_steps < 1:
            raise ValueError(f"LogDeltas got every_n_steps={every_n_steps}; need at least 1")
        self.every_n_steps = every_n_steps
        self._due = False
        self._hooks = ExitStack()
        self._sums: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Listen to the linear sites in a step that is read."""
        self._due = isinstance(pl_module, MixtureModule) and trainer.global_step % self.every_n_steps == 0
        self._sums = {}
        if not self._due or not isinstance(pl_module, MixtureModule) or pl_module.backend is not None:
            return
        for site in pl_module.mixture.sites:
            wrapper = pl_module.mixture.base.get_submodule(site.path)
            if site.form == "linear":
                handle = wrapper.register_forward_hook(partial(self._add, site.tower))
                self._hooks.callback(handle.remove)
                self._sums.setdefault(site.tower, torch.zeros(2, device=pl_module.device, dtype=torch.float64))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Log what was read."""
        self._hooks.close()
        if not self._due or not isinstance(pl_module, MixtureModule):
            return
        found = {f"effective_rank/{name}": rank for name, rank in effective_ranks(pl_module.mixture).items()}
        if self._sums:
            sums = trainer.strategy.reduce(torch.stack(list(self._sums.values())), reduce_op="sum")
            for tower, (own, base) in zip(self._sums, sums.tolist(), strict=True):
                if base:
                    found[f"contribution/{tower}"] = (own / base) ** 0.5
        pl_module.log_dict(found)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        self._hooks.close()

    @torch.no_grad()
    def _add(self, tower: str, wrapper: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(wrapper, AdaptedModule), "sites of a mixture are wrapped"
        base = wrapper.module(args[0])
        for index, each in enumerate((output - base, base)):
            self._sums[tower][index] += each.float().square().sum().double()


@torch.no_grad()
def effective_ranks(mixture: Mixture) -> dict[str, float]:
    """Return the mean over sites of the effective rank of each adapter that has a low-rank form and is not zero.

    Args:
        mixture: Its adapters are read.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    for _, bank in mixture.banks():
        factors = bank.low_rank()
        for name in dict.fromkeys(factors.owners) if factors is not None else ():
            assert factors is not None, "it has owners"
            own = torch.tensor([owner == name for owner in factors.owners], device=factors.down.device)
            found[name].append(effective_rank(factors.down[own], factors.up[own]))
    means = {name: torch.stack(ranks) for name, ranks in found.items()}
    means = {name: ranks[ranks > 0] for name, ranks in means.items()}
    return {name: float(ranks.mean()) for name, ranks in means.items() if len(ranks)}


def effective_rank(down: Tensor, up: Tensor) -> Tensor:
    """Return the effective rank of `up^T down`, from 1 to R; 0 where it is zero.

    Args:
        down: (R, D).
        up: (R, F).
    """
    small = [torch.linalg.qr(each.float().mT, mode="r").R for each in (up, down)]
    values = torch.linalg.svdvals(small[0] @ small[1].mT)
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    entropy = -torch.special.xlogy(shares, shares).sum()
    return torch.where(values.sum() > 0, entropy.exp(), torch.zeros_like(entropy))
