"""What adapters at a site cost for each token, found by running their bank on tensors without numbers."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moadapt.adapters.bank import Bank
from moadapt.call import Call
from moadapt.sites import Site

_FEW = 8


def _product(into: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...], **_: Any) -> int:
    """Count a matrix product that is added in place."""
    return 2 * math.prod(left) * right[-1]


_IN_PLACE = {torch.ops.aten.addmm_: _product, torch.ops.aten.baddbmm_: _product}


@dataclass(frozen=True)
class Cost:
    """What the adapters at one site cost for each token.

    Args:
        flops: Operations of the matrix products that a bank adds.
        saved: Bytes that a bank keeps for backward, beyond what the base keeps; its input among them, which other banks
            may share.
    """

    flops: int
    saved: int


def cost_at(site: Site, bank: Bank, module: nn.Module, dtype: torch.dtype) -> Cost | None:
    """Measure what a bank costs for each further token; None where that depends on more than the token.

    Args:
        site: Where.
        bank: On the meta device.
        module: The frozen module there.
        dtype: Number type of the hidden states.
    """
    if not bank.family.standalone or bank.family.reads_prompt:
        return None
    alone = site.form not in ("sublayer", "entry")  # these modules take more than hidden states
    frozen = deepcopy(module).to("meta").requires_grad_(False) if alone else None
    few, many = (_measured(bank, frozen, *_values(site, module, dtype, n), n) for n in (_FEW, 2 * _FEW))
    return Cost((many.flops - few.flops) // _FEW, (many.saved - few.saved) // _FEW)


def _measured(bank: Bank, module: nn.Module | None, x: Tensor, y: Tensor, tokens: int) -> Cost:
    """Measure a bank by itself, or what it adds to the module's own run."""
    mask = torch.ones(1, tokens, dtype=torch.bool, device="meta")
    call = Call(1, prompt=mask, image=mask)
    if module is None:
        return _cost_of(bank, lambda: bank(x, y, None, call))
    plain, adapted = _cost_of(bank, lambda: module(x)), _cost_of(bank, lambda: bank.adapt(module, x, None, call))
    return Cost(adapted.flops - plain.flops, adapted.saved - plain.saved)


def _cost_of(bank: Bank, run: Callable[[], object]) -> Cost:
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as counter:
        run()
    return Cost(counter.get_total_flops(), _saved(bank, run))


def _values(site: Site, module: Any, dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor]:
    """Return an input of a site and the frozen output there."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=True)

    if site.form == "embedding":
        return torch.empty(1, tokens, dtype=torch.long, device="meta"), empty(1, tokens, site.out_features)
    if site.form == "conv2d":
        return empty(tokens, module.in_channels, *module.kernel_size), empty(tokens, site.out_features, 1, 1)
    return empty(1, tokens, site.in_features), empty(1, tokens, site.out_features)


def _saved(bank: Bank, run: Callable[[], object]) -> int:
    """Return the bytes that autograd keeps, the bank's own left out, each storage counted once."""
    own = {_storage(tensor) for tensor in (*bank.parameters(), *bank.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in own)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
