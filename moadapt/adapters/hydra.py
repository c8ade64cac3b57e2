"""Hydra: two low-rank branches at a linear layer, `y = y0 + s Bp Ap x + s Bs As y0` with `y0 = W0 x + b0`.

Kim et al., "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning", section 3: the parallel branch
reads the input and learns new features, the serial one reads the frozen output and mixes features that are there. Both
are deltas against the frozen layer, however many adapters are added up. `Ap`, `As` start uniform within one over the
root of their width, `Bp`, `Bs` at zero. Axes: B rows, T tokens, D in, F out, E experts, R stacked ranks.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from moadapt.adapters.bank import Adapter
from moadapt.adapters.delta import Delta, Factors
from moadapt.adapters.family import FamilySpec
from moadapt.adapters.stacked import StackedBank
from moadapt.adapters.weighing import weigh_up
from moadapt.call import Call
from moadapt.registry import FAMILIES
from moadapt.sites import Site

BRANCHES = {"parallel": ("down", "up"), "serial": ("serial_down", "serial_up")}


@FAMILIES.register("hydra")
@dataclass(frozen=True, kw_only=True)
class Hydra(FamilySpec):
    """Low-rank branches that read the input and the frozen output of linear layers.

    Args:
        rank: Width of each branch's bottleneck, 1 or more.
        alpha: Numerator of the scale alpha / rank; None is the rank.
        branches: `both`, or one alone: `parallel` is LoRA, `serial` reads the frozen output only.

    Raises:
        ValueError: The rank is out of range or the branches are unknown.
    """

    rank: int = 8
    alpha: float | None = None
    branches: Literal["both", "parallel", "serial"] = "both"

    routes: ClassVar[frozenset[str]] = frozenset({"row", "token", "heads"})

    def __post_init__(self) -> None:
        """Check rank and branches."""
        if self.rank < 1 or self.branches not in ("both", *BRANCHES):
            raise ValueError(
                f"Hydra got rank={self.rank}, branches={self.branches!r}; need rank >= 1 and branches both, parallel "
                "or serial"
            )

    @property
    def scale(self) -> float:
        """The factor s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def shares_with(self) -> Hashable:
        """Return the branches."""
        return self.branches

    @classmethod
    def bank(cls, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> "HydraBank":
        """Build the stack of one site."""
        return HydraBank(site, adapters, module)


class HydraBank(StackedBank):
    """All Hydras of one site, stacked along the rank axis.

    Args:
        site: Where.
        adapters: Shared first, then experts.
        module: The frozen module there.
    """

    reads_output = True

    def __init__(self, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> None:
        chosen = _spec(adapters[0]).branches
        self._branches = {name: pair for name, pair in BRANCHES.items() if chosen in ("both", name)}
        self.tensors = tuple(tensor for pair in self._branches.values() for tensor in pair)
        super().__init__(site, adapters, module)

    def fresh(self, spec: Hydra) -> dict[str, Tensor]:
        """Return a uniform `down (r, D)` and `serial_down (r, F)`, and `up`, `serial_up (r, F)`, zero."""
        device, out = self.owner(self.tensors[0]).device, self.site.out_features
        found = {}
        for name, (down, up) in self._branches.items():
            width = self.site.in_features if name == "parallel" else out
            bound = 1 / math.sqrt(width)
            found[down] = torch.empty(spec.rank, width, device=device).uniform_(-bound, bound)
            found[up] = torch.zeros(spec.rank, out, device=device)
        return found

    def change(self, x: Tensor, y: Tensor, weights: Tensor, call: Call | None) -> Tensor:
        """Return what the branches add, weighed in rank space."""
        delta = torch.zeros_like(y)
        for name, down, up in self._stacks():
            read = (x if name == "parallel" else y).to(y.dtype)
            spread = self.spread(weights, self.tensors[0]) * self._scales.to(weights.dtype)
            delta = delta + weigh_up(read @ down.to(y.dtype).T, spread, up.to(y.dtype), self.site.path)
        return delta

    def delta(self, weights: Tensor) -> Delta:
        """Return the factors of `s Bp Ap + s Bs As W0`, and `s Bs As b0` where the layer has a bias."""
        factors, rows = self.low_rank(), self.row_weights(weights, self.tensors[0]).unsqueeze(1)
        up = factors.up.detach() * rows.repeat(len(self._branches), 1)
        return Delta(factors.down.detach(), up, bias=self._bias(rows))

    def low_rank(self) -> Factors:
        """Return the factors of every branch as maps of the input, the scales folded into `up`."""
        downs, ups, scales = [], [], self._scales.to(self.stack(self.tensors[0])).unsqueeze(1)
        for name, down, up in self._stacks():
            downs.append(down if name == "parallel" else down.to(self.frozen_map()[0]) @ self.frozen_map()[0])
            ups.append(up * scales)
        owners = tuple(adapter.name for adapter in self._in_order() for _ in range(_spec(adapter).rank))
        return Factors(owners * len(self._branches), torch.cat(downs), torch.cat(ups), self.frozen)

    def _bias(self, rows: Tensor) -> Tensor | None:
        """Return what the serial branch makes of the frozen bias under fixed weights of its ranks, (R, 1)."""
        bias = self.frozen_map()[1] if "serial" in self._branches else None
        if bias is None:
            return None
        down, up = (self.stack(tensor).detach().to(bias) for tensor in self._branches["serial"])
        return (down @ bias) @ (up * (rows * self._scales.to(rows).unsqueeze(1)).to(bias))

    def _stacks(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, (down, up) in self._branches.items():
            yield name, self.stack(down), self.stack(up)

    def _find_scales(self) -> None:
        """Find the scale of every stacked rank."""
        self._scales = self.each_row(self.tensors[0], lambda adapter: _spec(adapter).scale)


def _spec(adapter: Adapter) -> Hydra:
    assert isinstance(adapter.spec, Hydra), "the mixture groups adapters by family"
    return adapter.spec
