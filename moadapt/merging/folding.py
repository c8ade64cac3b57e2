"""A plain copy of a base that changes of its weights are folded into: no adapters, nothing quantised."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moadapt.adapters.delta import Delta
from moadapt.merging.report import MergeReport
from moadapt.quantised import departure, is_quantised, plain_linear

_ROUNDING = 0.004
"""More than outputs of 16-bit numbers are rounded by, and less than by quantising inputs to 8 bits."""


class PlainModel:
    """A plain copy of a base, in which every quantised weight is the one that it stands for.

    Args:
        base: Without a mixture on it.
        dtype: Number type of the copy's weights; None keeps the base's.
    """

    def __init__(self, base: PreTrainedModel, dtype: torch.dtype | None) -> None:
        self._from, self._dtype = base.dtype, dtype or base.dtype
        quantised = {path: module for path, module in base.named_modules() if is_quantised(module)}
        self._departures = {path: departure(module, base.dtype) for path, module in quantised.items()}
        exact = torch.promote_types(base.dtype, torch.float32)
        plain = {id(module): plain_linear(module, exact) for module in quantised.values()}
        self.model: PreTrainedModel = copy.deepcopy(base, plain)  # which are taken where it would copy those layers
        self._quantised = frozenset(quantised)
        self._unrounded = {f"{path}.{name}" for path, m in quantised.items() for name, _ in m.named_parameters()}
        self._sizes: dict[str, tuple[float, float]] = {}
        if quantised:
            _forget_quantisation(self.model)

    def fold(self, path: str, deltas: Sequence[Delta]) -> None:
        """Add deltas to a module's weight and bias, or to its other parameters, in float32, rounded once.

        Args:
            path: Of the module.
            deltas: One a family.

        Raises:
            ValueError: A weight cannot take a change.
        """
        module: Any = self.model.get_submodule(path)
        for name in {name: None for delta in deltas for name in delta.parameters or ("weight",)}:
            parts = [delta.parameters.get(name) if delta.parameters else delta for delta in deltas]
            changes = [part.weight() for part in parts if part is not None and part.moves_weight]
            if changes:  # a bias alone leaves the weight as it is, which may be tied
                self._change(path, name, changes)
        biases = [delta.bias for delta in deltas if delta.bias is not None]
        if biases:
            like = module.weight if module.bias is None else module.bias
            exact = torch.promote_types(like.dtype, torch.float32)
            old = torch.zeros_like(biases[0]) if module.bias is None else module.bias.detach()
            self._put(path, "bias", old.to(exact) + sum(bias.to(exact) for bias in biases), like.dtype)

    def settle(self, required_grad: Mapping[str, bool]) -> None:
        """Bring all that is left to the number type asked for, and let train what the base let train.

        Args:
            required_grad: Which parameters of the base were trainable before it was frozen, by name.
        """
        for name, parameter in self.model.named_parameters():
            if name in self._unrounded:
                parameter.data = self._stored(name, parameter.data, self._dtype)
            elif parameter.dtype == self._from:  # some bases keep parts finer
                parameter.data = parameter.data.to(self._dtype)
            dequantised = name.rpartition(".")[0] in self._quantised
            parameter.requires_grad_(dequantised or required_grad.get(name, True))  # a merge may have added a bias
        self.model.config.dtype = self._dtype

    def told(self, report: MergeReport) -> MergeReport:
        """Return a report that tells how the copy was rounded, and what was dequantised."""
        apart, whole = (sum(size[i] for size in self._sizes.values()) ** 0.5 for i in (0, 1))
        return replace(
            report,
            exact=report.exact and all(value <= _ROUNDING for value in self._departures.values()),
            rounding={name: _ratio(lost**0.5, size**0.5) for name, (lost, size) in self._sizes.items()},
            total_rounding=_ratio(apart, whole),
            dequantised=self._departures,
        )

    def _change(self, path: str, name: str, changes: Sequence[Tensor]) -> None:
        """Add changes to one parameter of a module."""
        module: Any = self.model.get_submodule(path)
        weight = getattr(module, name)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise ValueError(
                f"{path} keeps its {name} as {weight.dtype}, which cannot take a change; load the base unquantised, or "
                "quantised by torchao or bitsandbytes"
            )
        tied = [n for n, p in self.model.named_parameters(remove_duplicate=False) if p is weight]
        if len(tied) > 1:
            raise ValueError(
                f"{path} shares its {name} ({', '.join(tied)}); merging would change both; untie the base first"
            )
        exact = torch.promote_types(weight.dtype, torch.float32)
        total = sum(as_stored(module, change).to(exact) for change in changes)
        self._put(path, name, weight.detach().to(exact) + total, weight.dtype)

    def _put(self, path: str, name: str, wanted: Tensor, held: torch.dtype) -> None:
        """Store a new value of a parameter that was held in some type; one that differs from the base's stays."""
        full, own = f"{path}.{name}", held == self._from or path in self._quantised
        self._unrounded.discard(full)
        found = self._stored(full, wanted, self._dtype if own else held)
        setattr(self.model.get_submodule(path), name, nn.Parameter(found))

    def _stored(self, name: str, wanted: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a parameter as it is stored, and keep in mind what that rounded away."""
        found = wanted.to(dtype)
        lost = torch.linalg.vector_norm(found.to(wanted.dtype) - wanted)
        self._sizes[name] = float(lost) ** 2, float(torch.linalg.vector_norm(wanted)) ** 2
        return found


def _forget_quantisation(model: PreTrainedModel) -> None:
    """Take off what transformers keeps about a quantised model."""
    quantiser: Any = getattr(model, "hf_quantizer", None)
    if quantiser is not None:
        quantiser.remove_quantization_config(model)


def _ratio(lost: float, size: float) -> float:
    return lost / size if size else 0.0


def as_stored(module: nn.Module, change: Tensor) -> Tensor:
    """Turn a weight change the way round that a module keeps its weight.

    Args:
        module: Of a site.
        change: ([M,] F, D).
    """
    if isinstance(module, (Conv1D, nn.Embedding)) or getattr(module, "is_transposed", False):
        return change.mT
    return change.view(module.weight.shape) if isinstance(module, nn.Conv2d) else change
