"""Bottleneck adapters: a small network behind or beside a sublayer, `f(x) = U act(D x + b_D) + b_U`.

In series the output y of an attention or MLP becomes `y + a f(y)`, in parallel `y + a f(x)`, before the block adds its
residual. Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", section 2; behind the MLP only: Pfeiffer et
al., "AdapterFusion", section 3; in parallel: He et al., "Towards a Unified View of Parameter-Efficient Transfer
Learning", section 3. `D` starts uniform within 1/sqrt(d), `U` and the biases at zero, so a fresh adapter changes
nothing; with a norm behind `U`, which would blow any small output up, `U` starts as `D` does and the norm's gain at
zero. As the activation works on each number by itself, the adapters of a site stack along their widths: one GEMM down,
one up, the weights on what lies between. Axes: B rows, T tokens, d features, H heads of a routing, R stacked widths.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moadapt.adapters.bank import Adapter
from moadapt.adapters.delta import Delta, NotMergeable
from moadapt.adapters.family import FamilySpec
from moadapt.adapters.stacked import StackedBank
from moadapt.adapters.weighing import by_feature, weigh, weigh_up
from moadapt.call import Call
from moadapt.registry import FAMILIES
from moadapt.sites import Site

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


@FAMILIES.register("bottleneck")
@dataclass(frozen=True, kw_only=True)
class Bottleneck(FamilySpec):
    """Small network with a narrow middle, behind or beside attention and MLP.

    Args:
        width: Width of the middle, m, 1 or more; it has 2 d m + m + d parameters a site.
        form: `series` reads the output of the sublayer, `parallel` its input.
        style: `houlsby` sits at attention and MLP, `pfeiffer` at the MLP only; a placement with kinds overrules it.
        activation: `gelu`, `relu`, `silu`, `tanh` or `identity`.
        norm: `before` normalises what `D` reads, `after` what `U` gives, each with 2 d parameters more; or `none`.
        scale: Factor a of the output.
        learn_scale: Train the factor, from `scale` on: one parameter more.

    Raises:
        ValueError: The width is below 1, the scale is zero or no number, or a word is none of those above.
    """

    width: int = 16
    form: Literal["series", "parallel"] = "series"
    style: Literal["houlsby", "pfeiffer"] = "houlsby"
    activation: Literal["gelu", "relu", "silu", "tanh", "identity"] = "gelu"
    norm: Literal["none", "before", "after"] = "none"
    scale: float = 1.0
    learn_scale: bool = False

    forms: ClassVar[tuple[str, ...]] = ("sublayer",)
    routes: ClassVar[frozenset[str]] = frozenset({"row", "token", "heads"})
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check ranges and words."""
        if self.width < 1 or not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(
                f"Bottleneck got width={self.width}, scale={self.scale}; need width >= 1 and a finite scale other "
                "than 0, at which nothing would ever be learned"
            )
        words = {
            "form": ("series", "parallel"),
            "style": ("houlsby", "pfeiffer"),
            "activation": tuple(ACTIVATIONS),
            "norm": ("none", "before", "after"),
        }
        for option, known in words.items():
            if getattr(self, option) not in known:
                raise ValueError(f"Bottleneck got {option}={getattr(self, option)!r}; choose from {', '.join(known)}")

    def default_kinds(self) -> tuple[str, ...]:
        """Return the sublayers of its style."""
        return ("attention", "mlp") if self.style == "houlsby" else ("mlp",)

    def shares_with(self) -> tuple[object, ...]:
        """Return what is one for a whole stack: all but the width, the style and the start of a learned scale."""
        return self.form, self.activation, self.norm, self.learn_scale, None if self.learn_scale else self.scale

    @classmethod
    def bank(cls, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> "BottleneckBank":
        """Build the stack of one site."""
        return BottleneckBank(site, adapters, module)


class BottleneckBank(StackedBank):
    """All bottleneck adapters of one site that share their options, stacked along their widths.

    Args:
        site: Where.
        adapters: Shared first, then experts.
        module: The frozen module there.
    """

    reads_output = True
    indexed = ("down",)
    vectors = frozenset({"down_bias", "up_bias", "gain", "shift", "scale"})

    def __init__(self, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> None:
        self.options = _spec(adapters[0])
        norm = () if self.options.norm == "none" else ("gain", "shift")
        self.tensors = ("down", "down_bias", "up", "up_bias", *norm, *(("scale",) if self.options.learn_scale else ()))
        super().__init__(site, adapters, module)

    def fresh(self, spec: Bottleneck) -> dict[str, Tensor]:
        """Return `down (m, d)`, `down_bias (m,)`, `up (m, d)`, `up_bias (1, d)`, the norm's and the scale, (1,)."""
        assert spec.shares_with() == self.options.shares_with(), "the mixture groups adapters by what they share"
        width, device = self.site.out_features, self.owner("down").device
        bound = 1 / math.sqrt(width)
        zeros = torch.zeros(1, width, device=device)
        found = {
            "down": torch.empty(spec.width, width, device=device).uniform_(-bound, bound),
            "down_bias": torch.zeros(spec.width, device=device),
            "up": torch.zeros(spec.width, width, device=device),
            "up_bias": zeros,
            "gain": torch.ones_like(zeros),
            "shift": zeros.clone(),
            "scale": torch.full((1,), spec.scale, device=device),
        }
        if spec.norm == "after":
            bound = 1 / math.sqrt(spec.width)
            found |= {"up": found["up"].uniform_(-bound, bound), "gain": zeros.clone()}
        return {name: found[name] for name in self.tensors}

    def change(self, x: Tensor, y: Tensor, weights: Tensor, call: Call | None) -> Tensor:
        """Return the delta; a norm behind `U` needs every adapter's output by itself."""
        read = y if self.options.form == "series" else x.to(y.dtype)
        each = self.spread(weights, "up_bias").to(y.dtype) * self._factors(y.dtype)  # (B|1, T|1, H|1, adapters)
        if self.options.norm == "after":
            return self._normalised(self._middle(read), each)
        spread = each.index_select(-1, self.adapter_of("down"))
        added = weigh_up(self._middle(read), spread, self.stack("up").to(y.dtype), self.site.path)
        return added + weigh(each, self.stack("up_bias").to(y.dtype), self.site.path)

    def delta(self, weights: Tensor) -> Delta:
        """Refuse.

        Raises:
            NotMergeable: Always.
        """
        raise NotMergeable(
            f"{self.site.path}: a bottleneck adapter has an activation and sits at a whole sublayer, so no weight of "
            "the base can hold it; keep the mixture, or merge another family"
        )

    def _factors(self, dtype: torch.dtype) -> Tensor | float:
        """Return the factor a of every adapter, or of all."""
        return self.stack("scale").to(dtype) if self.options.learn_scale else self.options.scale

    def _middle(self, read: Tensor) -> Tensor:
        """Return what the activation gives for all stacked widths, (B, T, R)."""
        down, bias = self.stack("down").to(read.dtype), self.stack("down_bias").to(read.dtype)
        if self.options.norm == "before":  # one norm for all: each adapter's gain and shift go into its rows of D
            read = functional.layer_norm(read, (read.shape[-1],))
            gain, shift = (self.stack(name).to(read.dtype)[self.adapter_of("down")] for name in ("gain", "shift"))
            down, bias = down * gain, bias + (down * shift).sum(dim=1)
        return ACTIVATIONS[self.options.activation](functional.linear(read, down, bias))

    def _normalised(self, middle: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the adapters' outputs, each normalised by itself, (B, T, d)."""
        up, bias, gain, shift = (self.stack(name).to(middle.dtype) for name in ("up", "up_bias", "gain", "shift"))
        width = up.shape[-1]
        weights = by_feature(weights, width, self.site.path)  # (B|1, T|1, d|1, adapters)
        widths = self.counts("down")
        parts = zip(torch.split(middle, widths, dim=-1), torch.split(up, widths), strict=True)
        total = torch.zeros_like(middle[..., :1])
        for i, (part, rows) in enumerate(parts):
            output = functional.layer_norm(part @ rows + bias[i], (width,), gain[i], shift[i])
            total = total + weights[..., i] * output
        return total


def _spec(adapter: Adapter) -> Bottleneck:
    assert isinstance(adapter.spec, Bottleneck), "the mixture groups adapters by family"
    return adapter.spec
