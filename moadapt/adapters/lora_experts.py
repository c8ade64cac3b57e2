"""LoRA at the fused experts of a mixture-of-experts block, whose projections are three-dimensional parameters.

Each of the block's M experts has an `A` and a `B` in each of its two projections. The weights of the adapters' router
act on every token inside the projections, before the activation, so that this is the LoRA of the paper and not an
adapter of the block. The block's experts are run one after the other, as transformers does without kernels, so outputs
equal the base's own to rounding (1e-6) and not bit for bit. Tokens arrive as one axis, row after row. Axes: N = B T
tokens, M experts of the block, D in, F out of a projection, R stacked ranks.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moadapt.adapters.bank import Adapter
from moadapt.adapters.blending import refuse_blending
from moadapt.adapters.delta import Delta
from moadapt.adapters.lora_bank import LowRank, spec_of
from moadapt.adapters.stacked import PARTS, StackedBank
from moadapt.adapters.weighing import all_weights
from moadapt.call import Call
from moadapt.routing import Routing
from moadapt.sites import Site

PROJECTIONS = ("gate_up_proj", "down_proj")


class LoRAExperts(StackedBank):
    """All LoRAs of one mixture-of-experts block.

    Args:
        site: Where.
        adapters: Shared first, then experts.
        module: The block's fused experts.

    Raises:
        ValueError: The module follows no experts interface of transformers, or the adapters' dropouts differ.
    """

    tensors = tuple(f"{name}_{side}" for name in PROJECTIONS for side in ("down", "up"))
    runs_module = True

    def __init__(self, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> None:
        if not getattr(module, "has_gate", False) or not hasattr(module, "_apply_gate"):
            raise ValueError(
                f"{site.path} is a {type(module).__name__}, whose projections no experts interface of transformers "
                "describes; leave LoRA out there"
            )
        dropouts = {spec_of(adapter).dropout for adapter in adapters}
        if len(dropouts) > 1:
            raise ValueError(f"{site.path}: LoRAs of one site share a dropout, got {sorted(dropouts)}; make them equal")
        self.dropout, self.lr_ratio = dropouts.pop(), spec_of(adapters[0]).lr_ratio
        super().__init__(site, adapters, module)

    def fresh(self, spec: LowRank) -> dict[str, Tensor]:
        """Return for each projection `down (r, M, D)`, uniform, and `up (r, M, F)`, zero."""
        rank, found = spec.rank_at(self.site), {}
        for name in PROJECTIONS:
            count, wide, narrow = self._shape(name)
            down = torch.empty(rank, count, wide, device=self.owner(self.tensors[0]).device)
            found[f"{name}_down"] = down.uniform_(-1 / math.sqrt(wide), 1 / math.sqrt(wide))
            found[f"{name}_up"] = down.new_zeros(rank, count, narrow)
        return found

    def change(self, x: Tensor, y: Tensor, weights: Tensor, call: Call | None) -> Tensor:
        """Refuse, as the delta is no function of the block's input alone.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(f"{self.site.path}: LoRAs act within the fused experts; run the bank by `adapt`")

    def adapt(
        self, module: nn.Module, x: Tensor, routing: Routing | None, call: Call | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the block's experts with the adapters in their projections.

        Args:
            module: The fused experts.
            x: Hidden states, (N, D).
            routing: Weights of the adapters.
            call: Whose rows tell the tokens apart.
            args: Which of the block's experts each token takes and their weights, (N, K) each.
            kwargs: The same, by name.
        """
        if not self.names:
            return module(x, *args, **kwargs)
        chosen, shares = (*args, *kwargs.values())
        flat = x.reshape(-1, x.shape[-1])
        weights = self._weights(len(flat), routing, call).to(flat.dtype)
        factors = {name: self.stack(name).to(flat.dtype).unbind(1) for name in self.tensors}
        total = torch.zeros_like(flat)
        for expert in chosen.unique().tolist():
            if expert < self._shape("down_proj")[0]:  # a higher one stands for none
                token, place = torch.where(chosen == expert)
                own = {name: each[expert] for name, each in factors.items()}
                found = self._run(module, expert, own, flat[token], weights[token])
                total.index_add_(0, token, (found * shares[token, place, None]).to(total.dtype))
        return total.view_as(x)

    def delta(self, weights: Tensor) -> Delta:
        """Return the stacked factors of each projection in float32 or finer, the weights folded into `up`."""
        padded = functional.pad(weights.to(self.owner(self.tensors[0]).device), (1, 0), value=1.0)
        scaled = self.spread(padded.reshape(1, 1, 1, -1), self.tensors[0]).flatten() * self._scales.to(padded)
        found = {}
        for name in PROJECTIONS:
            sides = (self.stack(f"{name}_{side}").detach().transpose(0, 1) for side in ("down", "up"))
            down, up = (side.to(torch.promote_types(side.dtype, torch.float32)) for side in sides)
            found[name] = Delta(down, up * scaled.to(up.dtype)[:, None])
        none = scaled.new_zeros(0, 0)
        return Delta(none, none, parameters=found)

    def rates(self) -> dict[str, float]:
        """Return the factor of each projection's `up`."""
        return {f"{part}_{name}_up": self.lr_ratio for part in PARTS for name in PROJECTIONS}

    def _weights(self, tokens: int, routing: Routing | None, call: Call | None) -> Tensor:
        """Return weight times scale of every rank for every token, (N, R)."""
        refuse_blending(self, self.site, routing)
        weights = all_weights(routing, self.stack(self.tensors[0]))
        if weights.shape[2] > 1:
            raise ValueError(f"{self.site.path}: fused experts take weights without heads; choose another router")
        rows = 1 if call is None else call.num_rows
        spread = self.spread(weights, self.tensors[0])[:, :, 0] * self._scales.to(weights)
        return spread.expand(rows, tokens // rows, -1).reshape(tokens, -1)

    def _find_scales(self) -> None:
        """Find the scale of every stacked rank."""
        self._scales = self.each_row(self.tensors[0], lambda adapter: spec_of(adapter).scale)

    def _run(self, module: Any, expert: int, own: dict[str, Tensor], x: Tensor, weights: Tensor) -> Tensor:
        """Run one of the block's experts, adapted with its own factors, on its tokens."""
        for name in PROJECTIONS:
            weight = getattr(module, name)[expert]
            bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
            found = functional.linear(x, weight.T if module.is_transposed else weight, bias)
            x = functional.dropout(x, self.dropout, self.training) @ own[f"{name}_down"].T
            x = found + (x * weights) @ own[f"{name}_up"]
            x = module._apply_gate(x) if name == "gate_up_proj" else x
        return module.post_expert_norm(x) if getattr(module, "has_post_expert_norm", False) else x

    def _shape(self, name: str) -> tuple[int, int, int]:
        """Return M, D and F of a projection."""
        module: Any = self._module[0]
        count, *sides = getattr(module, name).shape
        wide, narrow = sides if module.is_transposed else reversed(sides)
        return count, wide, narrow
