"""A merge with fixed weights at every place: the weights, the deltas they make, the plain model and the report."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from moadapt.adapters.bank import Bank
from moadapt.adapters.delta import Delta
from moadapt.merging.calibration import Batch, Moments, relative_error
from moadapt.merging.folding import PlainModel
from moadapt.merging.report import MergeReport
from moadapt.mixture import Mixture
from moadapt.routing import Routing
from moadapt.sites import Site


class MergePlan:
    """Fixed weights for every place, ready to be folded.

    Args:
        mixture: What is merged; it stays usable.
        method: Short name of the method.
        weights: Weights of the experts, (E,), by place; or a routing (1, 1, H, E) where heads or parameters count.
        task: The task the merge serves; None for all.
        exact: Whether the mixture routes with just these weights for every input that the merge serves.
        found: Moments of the routing by place, where it depends on the input.
        held_out: Batches to measure the outputs on.
        fresh: Whether the merge was not made from those batches.
        max_error: Bound on the relative error of every site.

    Raises:
        ValueError: A place has no weights, as no calibration batch reached it.
    """

    def __init__(
        self,
        mixture: Mixture,
        method: str,
        weights: Mapping[str, Tensor | Routing],
        *,
        task: str | None,
        exact: bool,
        found: Mapping[str, Moments] | None = None,
        held_out: Sequence[Batch] = (),
        fresh: bool = False,
        max_error: float | None = None,
    ) -> None:
        missing = [place for place in mixture.places if place.name not in weights]
        if missing:
            raise ValueError(
                f"no calibration batch reached the router at {missing[0].name}, which serves {missing[0].sites[0]} and "
                "others; give batches that run its sites too, with images for a vision tower"
            )
        self.mixture, self.method, self.task, self.exact = mixture, method, task, exact
        self._weights = {path: weights[place.name] for place in mixture.places for path in place.sites}
        self._found = {path: found[p.name] for p in mixture.places for path in p.sites} if found else {}
        self._held_out, self._fresh, self._max_error = held_out, fresh, max_error
        self.dtype: torch.dtype | None = None
        """Number type of the plain model; None keeps the base's."""
        self._none = torch.zeros(len(mixture.experts))

    @cached_property
    def deltas(self) -> dict[str, list[Delta]]:
        """What is added at every site, one delta a family, by module path."""
        found: dict[str, list[Delta]] = {}
        for site, bank in self.mixture.banks():
            weights = self._weights.get(site.path, self._none)
            if isinstance(weights, Routing):
                delta = bank.delta_of_heads(weights) if bank.has_experts else bank.delta(self._none)
            else:
                delta = bank.delta(weights)
            found.setdefault(site.path, []).append(delta)
        return found

    @cached_property
    def errors(self) -> dict[str, float]:
        """Relative error of every site; 0 where the routing does not depend on the input."""
        banks: dict[Site, list[Bank]] = {}
        for site, bank in self.mixture.banks():
            banks.setdefault(site, []).append(bank)
        return {s.path: self._error(s, here) if s.path in self._found else 0.0 for s, here in banks.items()}

    @cached_property
    def _plain(self) -> PlainModel:
        MergeReport(self.method, self.task, self.exact, self.errors).require(self._max_error)
        with self.mixture.bare_base() as base:
            plain = PlainModel(base, self.dtype)
        for path, deltas in self.deltas.items():
            plain.fold(path, deltas)
        plain.settle(self.mixture.required_grad)
        return plain

    def model(self) -> PreTrainedModel:
        """Return the merged plain model.

        Raises:
            MergeRefusedError: A site's error passes the bound.
            NotMergeable: A family is no affine map.
            ValueError: A site's weight cannot take a change.
        """
        return self._plain.model

    def report(self) -> MergeReport:
        """Return how far the merge is from the mixture."""
        rows = sum(int(next(v for v in batch.values() if isinstance(v, Tensor)).shape[0]) for batch in self._held_out)
        report = MergeReport(self.method, self.task, self.exact, self.errors, self._output_kl(), self._fresh, rows)
        if "_plain" in vars(self):  # an export needs no plain model
            report = self._plain.told(report)
        report.require(self._max_error)
        return report

    def _error(self, site: Site, banks: Sequence[Bank]) -> float:
        """Relative error of what all families of a site add up to."""
        shared = _total([bank.delta(self._none) for bank in banks])
        own = [_without(_total([b.delta(one) for b in banks]), shared) for one in torch.eye(len(self.mixture.experts))]
        weights = self._weights[site.path]
        assert isinstance(weights, Tensor), "weights by head are exact, and no moments were found"
        return relative_error(
            [_compact(each) for each in (shared, *own)], self._found[site.path], weights.double().cpu()
        )

    def _output_kl(self) -> float | None:
        if not self._held_out:
            return None
        total, count = 0.0, 0
        for batch in self._held_out:
            inputs = {key: value for key, value in batch.items() if key not in ("task", "prompt_mask")}
            with torch.no_grad():
                outputs = (self.mixture(**batch), self._plain.model(**inputs))
            if not all(isinstance(getattr(output, "logits", None), Tensor) for output in outputs):
                return None
            routed, plain = (output.logits.float().log_softmax(-1) for output in outputs)
            told = _told(batch, routed, self._plain.model)
            apart = functional.kl_div(plain, routed, reduction="none", log_target=True)
            total, count = total + float(apart.sum(-1)[told].sum()), count + int(told.sum())
        return total / max(count, 1)


def _told(batch: Mapping[str, Any], logits: Tensor, base: PreTrainedModel) -> Tensor:
    """Which positions count: those that predict a label, without labels all that are no padding, (B, T) or (B,)."""
    shape, decodes = logits.shape[:-1], base.config.is_encoder_decoder
    labels, mask = batch.get("labels"), batch.get("decoder_attention_mask" if decodes else "attention_mask")
    if len(shape) == 2 and labels is not None and labels.shape == shape:
        ahead = base.can_generate() and not decodes  # such a base predicts the next token's label
        return functional.pad(labels[:, 1:] != -100, (0, 1), value=False) if ahead else labels != -100
    return mask.bool() if mask is not None and mask.shape == shape else torch.ones(shape, dtype=torch.bool)


def _total(deltas: Sequence[Delta]) -> Delta:
    """Add deltas up."""
    dense = [delta.dense for delta in deltas if delta.dense is not None]
    bias = [delta.bias for delta in deltas if delta.bias is not None]
    names = dict.fromkeys(name for delta in deltas for name in delta.parameters)
    return Delta(
        torch.cat([delta.down for delta in deltas], dim=-2),
        torch.cat([delta.up for delta in deltas], dim=-2),
        torch.stack(dense).sum(0) if dense else None,
        torch.stack(bias).sum(0) if bias else None,
        {name: _total([delta.parameters[name] for delta in deltas if name in delta.parameters]) for name in names},
    )


def _without(whole: Delta, shared: Delta) -> Delta:
    """Take the shared part out of a delta; rank-one terms that both have cancel exactly."""
    assert whole.parameters.keys() == shared.parameters.keys(), "of the same banks"
    parts = {name: _without(whole.parameters[name], shared.parameters[name]) for name in whole.parameters}
    if whole.down.shape != shared.down.shape or not torch.equal(whole.down, shared.down):
        rest = _total([whole, _negative(shared)])
        return Delta(rest.down, rest.up, rest.dense, rest.bias, parts)
    dense, bias = _minus(whole.dense, shared.dense), _minus(whole.bias, shared.bias)
    return Delta(whole.down, whole.up - shared.up, dense, bias, parts)


def _compact(delta: Delta) -> Delta:
    """Leave out rank-one terms that add nothing, such as those of other experts."""
    kept = (delta.up != 0).any(-1)
    kept = kept.any(0) if kept.ndim == 2 else kept
    parts = {name: _compact(part) for name, part in delta.parameters.items()}
    return Delta(delta.down[..., kept, :], delta.up[..., kept, :], delta.dense, delta.bias, parts)


def _minus(whole: Tensor | None, shared: Tensor | None) -> Tensor | None:
    if whole is None or shared is None:
        return whole if shared is None else -shared
    return whole - shared


def _negative(delta: Delta) -> Delta:
    dense, bias = (None if part is None else -part for part in (delta.dense, delta.bias))
    parameters = {name: _negative(part) for name, part in delta.parameters.items()}
    return Delta(delta.down, -delta.up, dense, bias, parameters)
