"""LoRA at the token embedding: `down` is a lookup, `y = W0[t] + c s up^T down[:, t]`.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", section 4, on an embedding as a linear map of one-hot
inputs. As ids cannot be dropped out, `dropout` does nothing here. `c` is the factor that some bases multiply their
embeddings by. Here `down` starts at zero and `up` normal, so that the first step moves the tokens that were seen.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moadapt.adapters.blending import refuse_blending
from moadapt.adapters.lora_bank import LoRABank, LowRank
from moadapt.adapters.stacked import PARTS
from moadapt.adapters.weighing import all_weights, weigh_up
from moadapt.call import Call
from moadapt.routing import Routing


class LoRALookup(LoRABank):
    """All LoRAs of the token embedding."""

    def fresh(self, spec: LowRank) -> dict[str, Tensor]:
        """Return `down (r, V)`, zero, and `up (r, F)`, normal."""
        device = self.owner("down").device
        up = torch.randn(spec.rank_at(self.site), self.site.out_features, device=device)
        return {"down": torch.zeros(spec.rank_at(self.site), self.site.in_features, device=device), "up": up}

    def add_to(self, y: Tensor, x: Tensor, routing: Routing | None, call: Call | None = None) -> Tensor:
        """Add the delta of tokens `x` (B, T) to their embeddings `y` (B, T, F)."""
        if not self.names:
            return y
        refuse_blending(self, self.site, routing)
        delta = self.change(x, y, all_weights(routing, y), call)
        factor = getattr(self._module[0], "embed_scale", 1)
        return y + delta * (factor.to(delta.dtype) if isinstance(factor, Tensor) else factor)

    def change(self, x: Tensor, y: Tensor, weights: Tensor, call: Call | None) -> Tensor:
        """Return the delta; only what is looked up of the table is cast, never the table."""
        spread = self.spread(weights, "rank") * self._ranks.scale(weights.dtype)
        found = [
            self._look_up(x, part) for part in (getattr(self, f"{name}_down") for name in PARTS) if part is not None
        ]
        return weigh_up(torch.cat(found, dim=-1).to(y.dtype), spread, self.stack("up").to(y.dtype), self.site.path)

    def _look_up(self, x: Tensor, down: Tensor) -> Tensor:
        """Return the columns of the tokens (B, T) in a part of the stack (R, V), (B, T, R)."""
        module = self._module[0]
        assert isinstance(module, nn.Embedding), "an embedding site"
        return functional.embedding(x, down.T, module.padding_idx)
