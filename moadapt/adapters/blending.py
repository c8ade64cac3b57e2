"""LoRAs blended in parameter space: first the factors, then the product, as Poly and MHR do.

Another function than a blend of outputs: `(sum w A)(sum w B)` has cross terms. Axes: B rows, H heads, E experts, R
rank.
"""

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from moadapt.adapters.delta import Delta
from moadapt.adapters.weighing import check_heads
from moadapt.routing import Routing
from moadapt.sites import Site

if TYPE_CHECKING:
    from moadapt.adapters.bank import Bank
    from moadapt.adapters.lora_bank import LoRABank


def add_blended(bank: "LoRABank", y: Tensor, x: Tensor, routing: Routing) -> Tensor:
    """Return an output with what each row's own adapter and the shared one add.

    Args:
        bank: Whose adapters.
        y: The output, (B, T, F).
        x: The input, (B, T, D), of the same dtype.
        routing: Weights of parameters, (B|1, T|1, H, E).

    Raises:
        ValueError: A gate shuts an expert out, or as in `blended`.
    """
    if bank.is_gated:
        raise ValueError(
            f"{bank.site.path}: a router that blends parameters needs every expert at every site, so no gate can "
            "shut one out; choose a router that blends outputs"
        )
    shared = bank.shared_factors(y.dtype)
    pairs = [] if shared is None else [shared]
    if routing.per_token:
        return y + sum(((x @ down.mT) @ up for down, up in pairs), start=_by_token(bank, x, routing))
    pairs = blended(bank, routing, y.dtype) + pairs
    # a start and what takes it off add up to zero before they meet `y`, which would round them apart
    return y + sum((x @ down.mT) @ up for down, up in pairs)


def blended_delta(bank: "LoRABank", routing: Routing) -> Delta:
    """Return the factors under fixed weights of parameters, those of the shared adapter included.

    Args:
        bank: Whose adapters.
        routing: The same for all rows, (1, 1, H, E).

    Raises:
        ValueError: As in `blended`.
    """
    dtype = bank.stack("up").dtype
    shared = bank.shared_factors(dtype)
    pairs = [(down[0], up[0]) for down, up in blended(bank, routing, dtype)] + ([] if shared is None else [shared])
    downs, ups = zip(*pairs, strict=True)
    return Delta(torch.cat(downs).detach(), torch.cat(ups).detach())


def blended(bank: "LoRABank", routing: Routing, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Return the factors of each row's own adapter; head h blends its slices of D and of F.

    Args:
        bank: Whose experts.
        routing: Weights of parameters, (B|1, 1, H, E).
        dtype: What to compute in.

    Returns:
        Pairs of `down (B, R, D)` and `up (B, R, F)`, the scale in `up`, whose products add up.

    Raises:
        ValueError: As in `check_experts`.
    """
    weights = routing.dense()[:, 0].to(dtype)
    heads, scale = weights.shape[1], check_experts(bank, routing.num_experts, weights.shape[1])

    def side(tensor: str) -> Tensor:
        return torch.einsum("bhe,erhd->brhd", weights, _slices(bank, tensor, heads, dtype)).flatten(2)

    found = [(side("down"), side("up") * scale)]
    if "start_down" in bank.tensors:  # what the base holds at the start is taken off
        found.append((side("start_down"), -side("start_up") * scale))
    return found


def _by_token(bank: "LoRABank", x: Tensor, routing: Routing) -> Tensor:
    """Return what each token's own adapter adds, (B, T, F), where rows are told apart along the axis of tokens.

    No token's factors are built: all experts shrink it, and their weighted sum is grown by all of them.
    """
    weights = routing.dense().to(x.dtype)
    heads, scale = weights.shape[2], check_experts(bank, routing.num_experts, weights.shape[2])
    inputs = rearrange(x, "b t (h d) -> b t h d", h=heads)

    def change(down: str, up: str) -> Tensor:
        each = torch.einsum("bthd,erhd->bther", inputs, _slices(bank, down, heads, x.dtype))
        shrunk = torch.einsum("bther,bthe->btr", each, weights)
        spread = shrunk[:, :, None, None] * weights.unsqueeze(-1)  # (B, T, H, E, R); what all add is too large
        return torch.einsum("bther,erhf->bthf", spread, _slices(bank, up, heads, x.dtype)).flatten(2) * scale

    found = change("down", "up")
    return found - change("start_down", "start_up") if "start_down" in bank.tensors else found


def _slices(bank: "LoRABank", tensor: str, heads: int, dtype: torch.dtype) -> Tensor:
    """Return a side of all experts, cut into the slices of the heads, (E, R, H, D / H)."""
    stacked = torch.stack([bank.live(adapter.name, tensor) for adapter in bank.experts()]).to(dtype)
    return rearrange(stacked, "e r (h d) -> e r h d", h=heads)


def check_experts(bank: "LoRABank", num_experts: int, heads: int) -> float:
    """Return the scale that all experts have.

    Args:
        bank: Whose experts.
        num_experts: E.
        heads: H.

    Raises:
        ValueError: The experts are not all here with one rank and scale, or H does not divide the site's widths.
    """
    site = bank.site
    shapes = {adapter.name: bank.shape_of(adapter) for adapter in bank.experts()}
    if len(set(shapes.values())) != 1 or len(shapes) != num_experts:
        told = ", ".join(f"{name} of rank {rank} and scale {scale:g}" for name, (rank, scale) in shapes.items())
        raise ValueError(
            f"{site.path}: blending parameters needs all {num_experts} experts in one stack with one rank and scale, "
            f"got {told}; give them the same settings, or choose a router that blends outputs"
        )
    check_heads(site.path, heads, site.in_features, site.out_features)
    return next(scale for _, scale in shapes.values())


def refuse_blending(bank: "Bank", site: Site, routing: Routing | None) -> None:
    """Refuse weights that blend parameters where only outputs can be blended.

    Raises:
        ValueError: They do.
    """
    if routing is not None and routing.combines == "parameters":
        bank.check_blending(site, routing.num_experts, routing.weights.shape[2])
