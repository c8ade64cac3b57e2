"""Scale: features rescaled by a learned vector, `y = (1 + l) * (W0 x + b0)` or `y = W0 ((1 + l) * x) + b0`.

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", section 3.3
((IA)^3), which rescales keys, values and what enters the last layer of each MLP. What is stored is the deviation `l`
from 1, zero at first, so that weighted sums of adapters stay linear. Axes: B rows, T tokens, D in, F out, E experts, H
heads of a routing.
"""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moadapt.adapters.bank import Adapter
from moadapt.adapters.delta import Delta
from moadapt.adapters.family import FamilySpec
from moadapt.adapters.stacked import StackedBank
from moadapt.adapters.weighing import all_weights, check_heads, over_features, weigh
from moadapt.call import Call
from moadapt.registry import FAMILIES
from moadapt.routing import Routing
from moadapt.sites import Site

SIDES = (None, "output", "input")
_KEYS_AND_VALUES = {"k", "v", "kv", "qkv", "key", "value", "keys", "values", "attn", "wqkv"}
"""Words in names of the layers that make keys and values, alone or with the queries."""


@FAMILIES.register("scale")
@dataclass(frozen=True, kw_only=True)
class Scale(FamilySpec):
    """Learned rescaling of what leaves or enters linear layers (IA3).

    Args:
        side: What is rescaled, `output` or `input`; None is the input of an MLP's last layer and the output of all
            others.

    Raises:
        ValueError: The side is unknown.
    """

    side: Literal["output", "input"] | None = None

    routes: ClassVar[frozenset[str]] = frozenset({"row", "token", "heads"})

    def __post_init__(self) -> None:
        """Check the side."""
        if self.side not in SIDES:
            raise ValueError(f"Scale got side={self.side!r}; choose output or input, or None for both by site")

    def by_default(self, site: Site) -> bool:
        """Sit at keys, values and the last layer of each MLP."""
        if site.kind == "attention":
            return bool(_KEYS_AND_VALUES & set(re.split(r"[_.]", site.path.rpartition(".")[2].lower())))
        return _ends_mlp(site)

    def shares_with(self) -> Hashable:
        """Return the side."""
        return self.side

    @classmethod
    def bank(cls, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> "ScaleBank":
        """Build the stack of one site."""
        spec = adapters[0].spec
        assert isinstance(spec, Scale), "the mixture groups adapters by family"
        side = spec.side or ("input" if _ends_mlp(site) else "output")
        return (InputScaleBank if side == "input" else OutputScaleBank)(site, adapters, module)


class ScaleBank(StackedBank):
    """All rescalings of one site."""

    tensors = ("scale",)
    vectors = frozenset(tensors)


class OutputScaleBank(ScaleBank):
    """Rescalings of what leaves a site."""

    reads_output = True

    def fresh(self, spec: Scale) -> dict[str, Tensor]:
        """Return `scale (1, F)`, zero."""
        return {"scale": torch.zeros(1, self.site.out_features, device=self.owner("scale").device)}

    def change(self, x: Tensor, y: Tensor, weights: Tensor, call: Call | None) -> Tensor:
        """Return the output times the weighted deviation."""
        deviation = weigh(self.spread(weights, "scale"), self.stack("scale").to(y.dtype), self.site.path)
        return y * over_features(deviation, x, y)

    def delta(self, weights: Tensor) -> Delta:
        """Return rescaled rows of the weight, and the rescaled bias."""
        weight, bias = self.frozen_map()
        deviation = self.blend(weights, "scale").to(weight)
        return self.full_delta(deviation.unsqueeze(1) * weight, None if bias is None else deviation * bias)


class InputScaleBank(ScaleBank):
    """Rescalings of what enters a site."""

    def fresh(self, spec: Scale) -> dict[str, Tensor]:
        """Return `scale (1, D)`, zero."""
        return {"scale": torch.zeros(1, self.site.in_features, device=self.owner("scale").device)}

    def change(self, x: Tensor, y: Tensor, weights: Tensor, call: Call | None) -> Tensor:
        """Return what the frozen layer makes of the deviation, each slice of the output by the weights of its head."""
        spread, heads = self.spread(weights, "scale"), weights.shape[2]
        check_heads(self.site.path, heads, self.site.out_features)
        slices = [self._run(self._scaled(x, spread[:, :, [h]])).chunk(heads, dim=-1)[h] for h in range(heads)]
        return torch.cat(slices, dim=-1).to(y.dtype)

    def adapt(
        self, module: nn.Module, x: Tensor, routing: Routing | None, call: Call | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Rescale the input and run the frozen layer once, unless the weights have heads."""
        weights = all_weights(routing, x)
        if not self.names or weights.shape[2] > 1:
            return super().adapt(module, x, routing, call, *args, **kwargs)
        change = self._scaled(x, self.spread(weights, "scale"))
        return module(x + change.reshape(x.shape), *args, **kwargs)

    def delta(self, weights: Tensor) -> Delta:
        """Return rescaled columns of the weight."""
        weight, _ = self.frozen_map()
        return self.full_delta(weight * self.blend(weights, "scale").to(weight))

    def _scaled(self, x: Tensor, spread: Tensor) -> Tensor:
        return x * weigh(spread, self.stack("scale").to(x.dtype), self.site.path)

    def _run(self, x: Tensor) -> Tensor:
        """Run the frozen layer without its bias."""
        module: Any = self._module[0]
        found: Tensor = module(x)
        return found if module.bias is None else found - module.bias


def _ends_mlp(site: Site) -> bool:
    """Tell whether a site is the last layer of an MLP: that from the wider hidden features to those of the block."""
    return site.kind == "mlp" and site.in_features > site.out_features
