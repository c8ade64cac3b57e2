"""LoRA whose `up` has a bias: `y = W0 x + b0 + s (B A x + b)`, as peft's `lora_bias`.

The bias starts at zero and is not decayed. Axes: B rows, T tokens, F out, E experts, H heads of a routing.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from moadapt.adapters.delta import Delta
from moadapt.adapters.lora_bank import LoRABank, LowRank, spec_of
from moadapt.adapters.weighing import all_weights, weigh
from moadapt.call import Call
from moadapt.routing import Routing
from moadapt.sites import Site


class LoRAOffset(LoRABank):
    """All LoRAs with a bias of one linear layer."""

    beside = ("bias",)
    vectors = frozenset(beside)

    def fresh(self, spec: LowRank) -> dict[str, Tensor]:
        """Return the factors, and `bias (1, F)`, zero."""
        bias = torch.zeros(1, self.site.out_features, device=self.owner("down").device)
        return {**super().fresh(spec), "bias": bias}

    def add_to(self, y: Tensor, x: Tensor, routing: Routing | None, call: Call | None = None) -> Tensor:
        """Add the delta to `y`."""
        if not self.names:
            return y
        added = super().add_to(y, x, routing, call)
        offset = self._weighed(all_weights(routing, y), y.dtype)
        return added + (offset.squeeze(0) if y.ndim == 2 else offset)

    def expert_outputs(self, x: Tensor, y: Tensor, num_experts: int, call: Call | None = None) -> Tensor:
        """Return what each expert adds, (B, T, E, F)."""
        owner = self.owner("bias")
        own = self.stack("bias").to(y.dtype) * self._offset_scales.to(y.dtype)[:, None]
        offsets = y.new_zeros(num_experts, y.shape[-1]).index_add(0, owner[owner >= 0], own[owner >= 0])
        return super().expert_outputs(x, y, num_experts, call) + offsets

    def delta(self, weights: Tensor) -> Delta:
        """Return the stacked factors and the weighted bias."""
        constant = Routing.constant(weights.to(self.owner("bias").device))
        return replace(super().delta(weights), bias=self._bias(constant))

    def delta_of_heads(self, routing: Routing) -> Delta:
        """Return the factors and the bias under fixed weights by head.

        Raises:
            NotMergeable: Parameters are blended.
        """
        return replace(super().delta_of_heads(routing), bias=self._bias(routing))

    def check_blending(self, site: Site, num_experts: int, heads: int) -> None:
        """Refuse to blend parameters, which a bias has no part in.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{site.path}: the parameters of {', '.join(self.names)} cannot be blended, as they have a bias; choose a "
            "router that blends outputs, or LoRAs with bias=False"
        )

    def _bias(self, routing: Routing) -> Tensor:
        stacked = self.stack("bias").detach()
        exact = torch.promote_types(stacked.dtype, torch.float32)
        return self._weighed(all_weights(routing, stacked), exact).detach()[0, 0]

    def _weighed(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weighted sum of the biases, (B|1, T|1, F)."""
        spread = self.spread(weights, "bias") * self._offset_scales.to(weights.dtype)
        return weigh(spread, self.stack("bias").to(dtype), self.site.path)

    def _find_scales(self) -> None:
        """Find the scale of every bias too, gates included."""
        super()._find_scales()
        self._offset_scales = self.each_row("bias", lambda a: spec_of(a).scale * self._gates.get(a.name, 1.0))

    def _fuses(self, module: nn.Module, x: Tensor, routing: Routing | None) -> bool:
        """Leave the base's own product out of the step, which knows of no bias."""
        return False
