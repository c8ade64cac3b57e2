"""Routing statistics over calibration rows: mean weights and their second moment, per place.

They are all that a merge with fixed weights and its error need: with `G` the Gram matrix of a site's deltas, the mean
square distance of routed and merged change is `sum_ef G_ef (M_ef - a_e m_f - m_e a_f + a_e a_f)`, where `m` and `M` are
the moments of the routing and `a` the merged weights. Axes: E experts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moadapt.adapters.delta import Delta
from moadapt.image_rows import take_rows
from moadapt.mixture import Mixture
from moadapt.places import Place
from moadapt.tracing import Observation

Batch = Mapping[str, Any]
_ROWS = 256
"""Rows of a dense change that are held in float64 at a time."""
_ROUNDED = 1e-6
"""Relative distances below this are what is left when products in float64 of factors in float32 cancel."""


@dataclass
class Moments:
    """Moments of one place's routing.

    Args:
        mean: (E,).
        second: Mean of outer products, (E, E).
        count: How many rows or tokens were averaged.
    """

    mean: Tensor
    second: Tensor
    count: float

    @classmethod
    def of(cls, weights: Tensor) -> "Moments":
        """Return those of a routing that is the same for all inputs.

        Args:
            weights: (E,).
        """
        exact = weights.double().cpu()
        return cls(exact, exact.outer(exact), 1.0)


def as_batches(calibration: Batch | Iterable[Batch]) -> list[Batch]:
    """Accept one batch or several.

    Raises:
        ValueError: There is none.
    """
    batches = [calibration] if isinstance(calibration, Mapping) else list(calibration)
    if not batches:
        raise ValueError("calibration holds no batch; give one or more dicts of what the mixture takes")
    return batches


def split_rows(batches: Sequence[Batch]) -> tuple[Sequence[Batch], Sequence[Batch], bool]:
    """Split batches into those a merge is made from and those it is measured on.

    Returns:
        Both parts, and whether they differ; a single batch serves for both.
    """
    if len(batches) < 2:
        return batches, batches, False
    return batches[::2], batches[1::2], True


def rows_of_tasks(mixture: Mixture, batches: Sequence[Batch], tasks: Sequence[str]) -> list[Batch]:
    """Keep the rows of some tasks; a batch without task names is kept whole.

    Raises:
        ValueError: No row is left.
    """
    wanted, kept = mixture.task_ids(list(tasks)), []
    for batch in batches:
        ids = mixture.task_ids(batch.get("task"))
        if ids is None or wanted is None or len(ids) == 1:
            keep = ids is None or wanted is None or bool(torch.isin(ids, wanted))
            kept += [batch] if keep else []
            continue
        rows = torch.isin(ids, wanted).nonzero().flatten()
        if len(rows):
            told = {name: value for name, value in batch.items() if name != "task"}
            kept.append({"task": ids[rows]} | take_rows(mixture.base, told, rows.tolist(), len(ids)))
    if not kept:
        names = " or ".join(map(repr, tasks))
        raise ValueError(f"calibration holds no row of task {names}; give rows of that task")
    return kept


def moments(mixture: Mixture, batches: Sequence[Batch]) -> dict[str, Moments]:
    """Run the batches and average their routings, over rows or over tokens that are no padding.

    Args:
        mixture: Evaluated without gradient.
        batches: Calibration rows.
    """
    sums: dict[str, Moments] = {}
    places, decodes = {place.name: place for place in mixture.places}, mixture.base.config.is_encoder_decoder
    for batch in batches:

        def note(each: Observation, batch: Batch = batch) -> None:
            if each.routing.combines == "parameters":
                raise ValueError(
                    f"the router at {each.place} blends parameters, which no average of its weights does; merge with "
                    "method 'task' for one task"
                )
            weights = each.routing.dense().float().cpu()
            real = _real_tokens(batch, places[each.place], weights.shape[1], decodes)
            _add(sums, each.place, weights, real, _num_rows(batch))

        with torch.no_grad(), mixture.watch(note):
            mixture(**batch)
    return {p: Moments(s.mean / s.count, s.second / s.count, s.count) for p, s in sums.items()}


def relative_error(shared: Delta, own: Sequence[Delta], found: Moments, merged: Tensor | Delta) -> float:
    """Return the relative error of a merge at one site: how far its change is from the routed one, over the latter.

    Args:
        shared: What all inputs get.
        own: What each expert by itself adds.
        found: Moments of the routing there.
        merged: Fixed weights, (E,), or the whole change.
    """
    weights = merged if isinstance(merged, Tensor) else torch.zeros(len(own))
    changes = [] if isinstance(merged, Tensor) else [merged]
    gram = _gram([shared, *own, *changes])
    routed = torch.zeros_like(gram)
    mean, second, end = found.mean.double(), found.second.double(), 1 + len(own)
    routed[0, 0], routed[0, 1:end], routed[1:end, 0], routed[1:end, 1:end] = 1.0, mean, mean, second
    apart = routed.clone()
    if changes:  # the merged change less the routed one
        apart[:end, end] = apart[end, :end] = -torch.cat([torch.ones(1).double(), mean])
        apart[end, end] = 1.0
    else:  # the shared one is in both
        fixed = weights.double().cpu()
        apart[0] = apart[:, 0] = 0.0
        apart[1:, 1:] += fixed.outer(fixed) - fixed.outer(mean) - mean.outer(fixed)
    whole, distance = float((gram * routed).sum()), float((gram * apart).sum())
    error = (max(distance, 0.0) / whole) ** 0.5 if whole > 0 else 0.0
    return error if error > _ROUNDED else 0.0


def decoder_tokens(batch: Batch) -> Tensor | None:
    """Return which tokens of an encoder-decoder's decoder are no padding, (B, T); None where that is not known.

    Args:
        batch: What the mixture takes.
    """
    mask, labels, ids = (batch.get(name) for name in ("decoder_attention_mask", "labels", "decoder_input_ids"))
    if mask is None and labels is not None:
        return torch.as_tensor(labels != -100)
    return torch.ones_like(ids) if mask is None and ids is not None else mask


def _gram(deltas: Sequence[Delta]) -> Tensor:
    """Frobenius products of the deltas, biases being one more column of the weights, (E+1, E+1)."""
    width = deltas[0].up.shape[1]
    biases = [torch.zeros(width) if delta.bias is None else delta.bias for delta in deltas]
    bias = torch.stack([each.double().cpu() for each in biases])
    return _gram_of_weights(deltas) + bias @ bias.T


def _gram_of_weights(deltas: Sequence[Delta]) -> Tensor:
    """Frobenius products of the deltas' weights and other parameters, (E+1, E+1)."""
    gram = _gram_of_matrices(deltas)
    for name in deltas[0].parameters:
        gram = gram + _gram_of_matrices([delta.parameters[name] for delta in deltas])
    return gram


def _gram_of_matrices(deltas: Sequence[Delta]) -> Tensor:
    """Frobenius products, in low-rank form unless one is dense, (E+1, E+1)."""
    dense = next((delta.dense for delta in deltas if delta.dense is not None), None)
    if dense is not None:
        size = dense.shape[deltas[0].up.ndim - 2]
        slices = [torch.arange(i, min(i + _ROWS, size), device=dense.device) for i in range(0, size, _ROWS)]
        parts = (torch.stack([_rows(delta, rows) for delta in deltas]) for rows in slices)
        return torch.stack([(part @ part.T).cpu() for part in parts]).sum(0)
    down = torch.cat([delta.down for delta in deltas], dim=-2).double()
    up = torch.cat([delta.up for delta in deltas], dim=-2).double()
    products = (up @ up.mT) * (down @ down.mT)
    products = products.sum(0) if products.ndim == 3 else products
    owner = torch.arange(len(deltas)).repeat_interleave(torch.tensor([delta.down.shape[-2] for delta in deltas]))
    member = torch.nn.functional.one_hot(owner, len(deltas)).to(products)
    return (member.T @ products @ member).cpu()


def _rows(delta: Delta, rows: Tensor) -> Tensor:
    """Some rows of a weight change, flat, in float64."""
    dense = None if delta.dense is None else delta.dense.index_select(delta.up.ndim - 2, rows).double()
    if dense is not None and not delta.down.numel():
        return dense.flatten()
    product = delta.up.index_select(-1, rows).double().mT @ delta.down.double()
    return (product if dense is None else product + dense).flatten()


def _add(sums: dict[str, Moments], place: str, weights: Tensor, real: Tensor | None, rows: int) -> None:
    num_experts = weights.shape[-1]
    if weights.shape[2] > 1:
        raise ValueError(f"the routing at {place} has {weights.shape[2]} heads; merging heads is not supported")
    if weights.shape[1] > 1 and real is not None and real.shape == weights.shape[:2]:
        flat = weights[:, :, 0][real.bool().cpu()].double()
    else:
        flat = weights.reshape(-1, num_experts).double()
        flat = flat.expand(rows, -1) if len(flat) == 1 else flat
    new = sums.setdefault(
        place, Moments(torch.zeros(num_experts).double(), torch.zeros(num_experts, num_experts).double(), 0)
    )
    new.mean, new.second, new.count = new.mean + flat.sum(0), new.second + flat.T @ flat, new.count + len(flat)


def _real_tokens(batch: Batch, place: Place, length: int, decodes: bool) -> Tensor | None:
    """Which tokens at a place are no padding, (B, T); None where all count or that is not known."""
    if place.tower != "language":
        return None
    masks = [batch.get("attention_mask")]
    if decodes and "decoder" in place.name.split("."):  # whose cross-attention reads the encoder's tokens too
        masks.insert(0, decoder_tokens(batch))
    return next((mask for mask in masks if mask is not None and mask.ndim == 2 and mask.shape[1] == length), None)


def _num_rows(batch: Batch) -> int:
    return next(len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim > 0)
