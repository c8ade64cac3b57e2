"""How far a merge is from its mixture on rows: what linear sites give, and what the models predict.

Axes: B rows, T tokens, N real tokens of a site, R ranks of all experts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from moadapt.adapters.delta import Delta
from moadapt.input_means import Products
from moadapt.merging.calibration import Batch
from moadapt.merging.deltas import apply, total
from moadapt.merging.factored import Factored, factored
from moadapt.merging.statistics import adapters_of, running, tokens
from moadapt.mixture import Mixture
from moadapt.sites import Site
from moadapt.tracing import SiteObservation


@dataclass(frozen=True)
class Agreement:
    """How far predictions are apart.

    Args:
        kl: Mean Kullback-Leibler divergence of the merged model's distribution from the routed one's, in nats.
        top1: Share of predictions whose likeliest token or class is the same.
    """

    kl: float
    top1: float


class SiteDistances:
    """Sums the squared distance of merged and routed change at linear sites, over what enters them.

    Args:
        mixture: That routes.
        merged: The merged changes, by module path.
    """

    def __init__(self, mixture: Mixture, merged: Mapping[str, Sequence[Delta]]) -> None:
        self.products = Products()
        self._known: dict[Site, tuple[Delta, Delta, Factored]] = {}
        for at in adapters_of(mixture):
            terms = factored(at)
            if terms is not None:
                self._known[at.site] = at.shared, total(merged[at.site.path]), terms
        self._sums: dict[Site, tuple[float, float]] = {}

    def note(self, seen: SiteObservation) -> None:
        """Take in what enters a site.

        Args:
            seen: What was told of it.
        """
        if seen.routing is None or seen.site not in self._known:
            return
        shared, merged, terms = self._known[seen.site]
        x, weights = tokens(seen, self.products.real(seen.site, seen.x))
        x = x.to(terms.down)
        own = (terms.shrink(x) * weights.to(x)[:, terms.owner]) @ terms.up
        both = apply(shared, x)
        apart = float((both + own - apply(merged, x)).double().square().sum())
        size = float((both + own).double().square().sum())
        before = self._sums.get(seen.site, (0.0, 0.0))
        self._sums[seen.site] = before[0] + apart, before[1] + size

    def errors(self) -> dict[str, float]:
        """Return the relative errors by module path."""
        return {site.path: (apart / size) ** 0.5 if size else 0.0 for site, (apart, size) in self._sums.items()}


def output_errors(mixture: Mixture, merged: Mapping[str, Sequence[Delta]], rows: Iterable[Batch]) -> dict[str, float]:
    """Return, of each linear site with experts, how far the merged change's outputs are from the routed one's.

    Args:
        mixture: That routes.
        merged: The merged changes, by module path.
        rows: Batches.
    """
    distances = SiteDistances(mixture, merged)
    for _ in running(mixture, rows, distances.products, distances.note):
        pass
    return distances.errors()


def agreement(mixture: Mixture, model: PreTrainedModel, rows: Iterable[Batch]) -> Agreement | None:
    """Compare what both predict; None where they give no logits.

    Args:
        mixture: That routes.
        model: The merged one.
        rows: Batches.
    """
    kl = same = count = 0.0
    for batch in rows:
        inputs = {key: value for key, value in batch.items() if key not in ("task", "prompt_mask")}
        with torch.no_grad():
            outputs = (mixture(**batch), model(**inputs))
        if not all(isinstance(getattr(output, "logits", None), Tensor) for output in outputs):
            return None
        routed, merged = (output.logits.float().log_softmax(-1) for output in outputs)
        told = predicting(batch, routed, model)
        apart = functional.kl_div(merged, routed, reduction="none", log_target=True)
        kl, count = kl + float(apart.sum(-1)[told].sum()), count + int(told.sum())
        same += int((routed.argmax(-1) == merged.argmax(-1))[told].sum())
    return Agreement(kl / max(count, 1), same / max(count, 1))


def predicting(batch: Mapping[str, Any], logits: Tensor, base: PreTrainedModel) -> Tensor:
    """Return which positions count: those that predict a label, without labels all that are no padding, (B, T) or (B,).

    Args:
        batch: What the mixture takes.
        logits: Of a base, ([B,] T, V) or (B, classes).
        base: Whose.
    """
    shape, decodes = logits.shape[:-1], base.config.is_encoder_decoder
    labels, mask = batch.get("labels"), batch.get("decoder_attention_mask" if decodes else "attention_mask")
    if len(shape) == 2 and labels is not None and labels.shape == shape:
        ahead = base.can_generate() and not decodes  # such a base predicts the next token's label
        return functional.pad(labels[:, 1:] != -100, (0, 1), value=False) if ahead else labels != -100
    return mask.bool() if mask is not None and mask.shape == shape else torch.ones(shape, dtype=torch.bool)
