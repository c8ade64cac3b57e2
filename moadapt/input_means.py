"""What enters linear layers of the frozen base: calibration batches run through it, and inputs are summed up by site.

Kept of them is the mean outer product, (D, D), in float32 or finer, which streams and of which padding is no part.
Sites that read one and the same tensor, such as q, k and v, are summed once. Axes: B rows, T tokens, D features.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moadapt.merging.calibration import Batch, decoder_tokens
from moadapt.sites import Site

_DECODER = "decoder_attention_mask"
_NOT_FOR_THE_BASE = ("task", "prompt_mask")


def input_means(base: PreTrainedModel, sites: Iterable[Site], batches: Iterable[Batch]) -> dict[Site, Tensor]:
    """Run batches through a base and return the mean outer product of what enters each site.

    Args:
        base: Without adapters, see `Mixture.bare_base`; run as it is, without gradients.
        sites: Linear layers.
        batches: What the mixture takes.

    Returns:
        (D, D) for each site; sites that read the same inputs share one tensor.

    Raises:
        ValueError: No batch reached a site.
    """
    wanted, found = tuple(sites), Products()
    modules = {site: base.get_submodule(site.path) for site in wanted}
    handles = [module.register_forward_pre_hook(partial(_note, found, site)) for site, module in modules.items()]
    try:
        with torch.no_grad(), found.following(base):
            for batch in batches:
                found.begin(batch)
                base(**{name: value for name, value in batch.items() if name not in _NOT_FOR_THE_BASE})
                found.flush()
    finally:
        for handle in handles:
            handle.remove()
    return found.means(wanted)


class Products:
    """Mean outer products of inputs, for each group of sites that read the same ones."""

    batch: Batch
    """What is being run; of an encoder-decoder with the mask of its decoder, however that is known."""
    encoded: Tensor | None = None
    """What the encoder gave, which keys and values of cross-attention read."""

    def __init__(self) -> None:
        self._means: dict[tuple[Site, ...], tuple[Tensor, int]] = {}
        self._last: tuple[Tensor, Tensor | None, Tensor, int] | None = None
        self._readers: list[Site] = []
        self._decodes = False

    @contextmanager
    def following(self, base: Any) -> Iterator[None]:
        """Know within the `with` block what an encoder gives, which sites of a decoder read too.

        Args:
            base: That runs.
        """
        self._decodes = base.config.is_encoder_decoder
        handle = _note_encoder(base, self) if self._decodes else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()

    def begin(self, batch: Batch) -> None:
        """Take note of the batch that is about to run.

        Args:
            batch: What the mixture takes.
        """
        self.batch = {**batch, _DECODER: decoder_tokens(batch)} if self._decodes else batch
        self.encoded = batch["encoder_outputs"][0] if batch.get("encoder_outputs") else None

    def add(self, site: Site, x: Tensor) -> None:
        """Take in what enters a site.

        Args:
            site: Where.
            x: (B, T, D) or (N, D).
        """
        mask = self.real(site, x)
        if self._last is None or x is not self._last[0] or mask is not self._last[1]:
            self.flush()
            real = x.reshape(-1, x.shape[-1]) if mask is None else x[mask.bool()]
            real = real.to(torch.promote_types(x.dtype, torch.float32))
            self._last = x, mask, real.T @ real, len(real)
        self._readers.append(site)

    def flush(self) -> None:
        """Put the last inputs, all of whose readers are known now, to those that the same sites read."""
        if self._last is None:
            return
        *_, product, new = self._last
        readers = tuple(self._readers)
        self._last, self._readers = None, []
        if not new:
            return
        mean, count = self._means.get(readers, (torch.zeros_like(product), 0))
        count += new
        self._means[readers] = mean.mul_((count - new) / count).add_(product, alpha=1 / count), count

    def means(self, sites: Iterable[Site]) -> dict[Site, Tensor]:
        """Return the means of sites, see `input_means`."""
        return {site: self._mean(site) for site in sites}

    def real(self, site: Site, x: Tensor) -> Tensor | None:
        """Return which tokens are no padding, (B, T); None where the site has other axes.

        Args:
            site: Where.
            x: Its input.
        """
        if site.tower != "language":
            return None
        decodes = "decoder" in site.path.split(".") and _DECODER in self.batch and x is not self.encoded
        mask: Tensor | None = self.batch.get(_DECODER if decodes else "attention_mask")
        return mask if mask is not None and mask.shape == x.shape[:-1] else None

    def _mean(self, site: Site) -> Tensor:
        parts = [part for readers, part in self._means.items() if site in readers]
        if not parts:
            raise ValueError(
                f"no calibration batch reached {site.path}; give batches that run it too, with images for a vision "
                "tower"
            )
        if len(parts) == 1:
            return parts[0][0]
        total = sum(count for _, count in parts)
        return torch.stack([mean * (count / total) for mean, count in parts]).sum(dim=0)


def _note_encoder(base: Any, found: Products) -> RemovableHandle:
    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.encoded = output[0]

    handle: RemovableHandle = base.get_encoder().register_forward_hook(note)
    return handle


def _note(found: Products, site: Site, module: nn.Module, args: tuple[Any, ...]) -> None:
    found.add(site, args[0])
