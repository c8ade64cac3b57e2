"""Starts that read data: calibration batches run through the frozen base, and what enters each site is summed up.

Kept of it is the mean outer product of a site's inputs, (D, D), in float32 or finer, which streams and of which padding
is no part. Axes: B rows, T tokens, D features.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moadapt.merging.calibration import Batch, as_batches
from moadapt.mixture import Mixture
from moadapt.sites import Site


class Sums:
    """Sum of the outer products of one site's inputs.

    Args:
        site: Where.
    """

    def __init__(self, site: Site) -> None:
        self.site, self.count = site, 0
        self.total: Tensor | None = None

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Add inputs up.

        Args:
            x: (B, T, D) or (N, D).
            mask: Which tokens are no padding, (B, T); not used where the site has other axes.
        """
        real = x[mask.bool()] if mask is not None and mask.shape == x.shape[:-1] else x.reshape(-1, x.shape[-1])
        real = real.to(torch.promote_types(x.dtype, torch.float32))
        self.total = real.T @ real + (0 if self.total is None else self.total)
        self.count += len(real)

    def mean(self) -> Tensor:
        """Return the mean outer product, (D, D).

        Raises:
            ValueError: No batch reached the site.
        """
        if self.total is None or not self.count:
            raise ValueError(
                f"no calibration batch reached {self.site.path}; give batches that run it too, with images for a "
                "vision tower"
            )
        return self.total / self.count


def initialise(mixture: Mixture, batches: Batch | Iterable[Batch]) -> None:
    """Give adapters whose start reads data, such as `LoRA(init="eva")`, their first weights.

    Adapters that were initialised or loaded before stay as they are.

    Args:
        mixture: Whose adapters.
        batches: One batch or several of what the mixture takes; a few hundred rows like those to train on, or for
            `corda_preserve` like those whose knowledge is to be kept.

    Raises:
        ValueError: There is no batch, or none reached a site.
    """
    waiting = [(site, bank) for site, bank in mixture.banks() if bank.waiting]
    if not waiting:
        return
    sums = input_sums(mixture, {site for site, _ in waiting}, as_batches(batches))
    for site, bank in waiting:
        bank.start(sums[site].mean())


def input_sums(mixture: Mixture, sites: Iterable[Site], batches: Iterable[Batch]) -> dict[Site, Sums]:
    """Run batches through the bare base and sum up what enters sites.

    Args:
        mixture: Whose base.
        sites: Linear layers.
        batches: What the mixture takes.
    """
    sums = {site: Sums(site) for site in sites}
    with mixture.bare_base() as base, torch.no_grad():
        current: dict[str, Any] = {}
        handles = [
            base.get_submodule(site.path).register_forward_pre_hook(partial(_note, one, current))
            for site, one in sums.items()
        ]
        try:
            for batch in batches:
                current.update({"attention_mask": None, "decoder_attention_mask": None}, **batch)
                base(**{name: value for name, value in batch.items() if name not in ("task", "prompt_mask")})
        finally:
            for handle in handles:
                handle.remove()
    return sums


def _note(sums: Sums, batch: Mapping[str, Any], module: nn.Module, args: tuple[Any, ...]) -> None:
    decodes = "decoder" in sums.site.path.split(".") and batch.get("decoder_input_ids") is not None
    mask = batch["decoder_attention_mask" if decodes else "attention_mask"]
    sums.add(args[0], mask if sums.site.tower == "language" else None)
