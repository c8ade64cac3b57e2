"""What adapters have in common, taken out of each: `DW_e - DW_general`.

Bagherifard et al., "GenKnowSub: Improving Modularity and Reusability of LLMs through General Knowledge Subtraction".
The general part is an adapter that was trained on general data, or here also the mean of the experts' changes. They are
subtracted as products, exactly, by factors side by side, `[B_e, -B_g] [A_e; A_g]`; differences of the A's and of the
B's would have cross terms and depend on the basis that each adapter is written in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moadapt.adapters.bank import Bank
from moadapt.adapters.delta import Factors
from moadapt.adapters.lora import LoRA
from moadapt.composing import build_filled
from moadapt.mixture import Mixture
from moadapt.names import SHARED
from moadapt.placement import Placement
from moadapt.sites import Site
from moadapt.storage import tensors


def subtract_general(mixture: Mixture, general: str | None = None) -> Mixture:
    """Take what is general out of every expert.

    Ranks grow: an expert gets its own and those of what is subtracted, with the mean those of all experts.

    Args:
        mixture: Whose experts have a low-rank form; it is detached from its base.
        general: Name of the adapter to subtract, an expert, which is routed no longer, or `shared`, which stays; None
            is the mean of the experts.

    Returns:
        A new mixture on the same base, whose experts are LoRAs and whose routers are fresh.

    Raises:
        ValueError: There is no such adapter, an expert has no low-rank form, or nothing would be left.
    """
    names = [adapter.name for adapter in mixture.spec.adapters()]
    if general is not None and general not in names:
        raise ValueError(f"there is no adapter {general!r} to subtract; this mixture has {', '.join(names)}")
    kept = [name for name in mixture.experts if name != general]
    if len(mixture.experts) < 2 and general in (None, *mixture.experts):
        raise ValueError("subtracting what a single expert has in common with itself leaves nothing; give more experts")
    shares = {name: _shares(name, mixture.experts, general) for name in kept}
    changes = {name: dict[Site, tuple[Tensor, Tensor]]() for name in kept}
    for site, factors in _factors(mixture, {*mixture.experts, *([general] if general else [])}).items():
        for name in kept:
            down, up = _weighted(factors, shares[name])
            if len(down):
                changes[name][site] = down, up
    experts = {name: _spec(mixture, name, found) for name, found in changes.items()}
    stored = {name: t for name, t in tensors(mixture).items() if name.startswith(f"adapters/{SHARED}/")}
    for name, found in changes.items():
        for site, (down, up) in found.items():
            stored |= {f"adapters/{name}/{site.path}/down": down, f"adapters/{name}/{site.path}/up": up}
    spec = replace(mixture.spec, experts=experts)
    frozen = [name for name in mixture.frozen if name in (SHARED, *kept)]
    return build_filled(mixture.detach(), spec, stored, frozen)


def _shares(name: str, experts: Sequence[str], general: str | None) -> dict[str, float]:
    """Return how much of each adapter's change goes into the new change of one expert."""
    if general is not None:
        return {name: 1.0, general: -1.0}
    return {other: (other == name) - 1 / len(experts) for other in experts}


def _factors(mixture: Mixture, names: set[str]) -> dict[Site, Factors]:
    """Return the low-rank forms at every site that has one of these adapters.

    Raises:
        ValueError: One of them has none, or does more than change the weight.
    """
    found: dict[Site, list[Factors]] = {}
    for site, bank in mixture.banks():
        if names & set(bank.names):
            factors = bank.low_rank()
            if factors is None or _more_than_weight(bank, len(mixture.experts)):
                raise ValueError(
                    f"{site.path}: {', '.join(sorted(names & set(bank.names)))} of family {bank.family.__name__} is no "
                    "low-rank change of the weight alone; subtract among LoRAs"
                )
            found.setdefault(site, []).append(factors)
    return {site: Factors.join(parts) for site, parts in found.items()}


def _more_than_weight(bank: Bank, num_experts: int) -> bool:
    delta = bank.delta(torch.ones(num_experts))
    return delta.dense is not None or delta.bias is not None or bool(delta.parameters)


def _weighted(factors: Factors, shares: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Put factors side by side, (R, D) and (R, F), the shares folded into `up`."""
    parts = [(factors.of(name), share) for name, share in shares.items()]
    return torch.cat([down for (down, _), _ in parts]), torch.cat([up * share for (_, up), share in parts])


def _spec(mixture: Mixture, name: str, found: Mapping[Site, tuple[Tensor, Tensor]]) -> LoRA:
    """Return a LoRA of scale 1 with these ranks at these sites."""
    ranks = {site.path: len(down) for site, (down, _) in found.items()}
    dropout = getattr(mixture.spec.experts[name], "dropout", 0.0)
    placement = Placement(modules=tuple(ranks), unread=True)
    return LoRA(rank=max(ranks.values()), ranks=ranks, dropout=dropout, placement=placement)
