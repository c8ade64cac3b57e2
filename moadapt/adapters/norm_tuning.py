"""Norm tuning: changes of a norm's gain and bias, `y = n(x) * (g0 + dg) + b0 + db`.

Zhao et al., "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", section 3, where the gains
themselves are trained; here each adapter keeps changes of its own, so that several share one base. Changes start at
zero. `n(x)`, the normalised input, is what the frozen module makes of a gain of one, so that every norm that is
proportional to its gain will do: with a mean or without, with the gain stored as it is or as its distance from one.
Axes: B rows, T tokens, F features, E experts.
"""

import inspect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moadapt.adapters.bank import Adapter
from moadapt.adapters.delta import Delta, NotMergeable
from moadapt.adapters.family import FamilySpec
from moadapt.adapters.stacked import StackedBank
from moadapt.adapters.weighing import over_features, weigh
from moadapt.call import Call
from moadapt.registry import FAMILIES
from moadapt.sites import Site

BIASES = ("existing", "all", "none")


@FAMILIES.register("norm_tuning")
@dataclass(frozen=True, kw_only=True)
class NormTuning(FamilySpec):
    """Changes of the gains, and of the biases, of norms.

    Args:
        bias: Which norms change their bias too: those that have one (`existing`), `all`, or `none`. A bias that most
            norms without one cannot hold keeps a mixture from being merged.

    Raises:
        ValueError: The choice of biases is unknown.
    """

    bias: Literal["existing", "all", "none"] = "existing"

    forms: ClassVar[tuple[str, ...]] = ("norm",)

    def __post_init__(self) -> None:
        """Check the choice."""
        if self.bias not in BIASES:
            raise ValueError(f"NormTuning got bias={self.bias!r}; choose one of {', '.join(BIASES)}")

    def default_kinds(self) -> tuple[str, ...]:
        """Return that of norms."""
        return ("norm",)

    def shares_with(self) -> Hashable:
        """Return the choice of biases."""
        return self.bias

    @classmethod
    def bank(cls, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> "NormTuningBank":
        """Build the stack of one site."""
        return NormTuningBank(site, adapters, module)


class NormTuningBank(StackedBank):
    """All changes of one norm.

    Args:
        site: Where.
        adapters: Shared first, then experts.
        module: The frozen norm.

    Raises:
        ValueError: The module takes more than its input, or is not proportional to its gain.
    """

    vectors = frozenset({"gain", "bias"})

    def __init__(self, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> None:
        spec = adapters[0].spec
        assert isinstance(spec, NormTuning), "the mixture groups adapters by family"
        biased = spec.bias == "all" or (spec.bias == "existing" and site.has_bias)
        self.tensors = ("gain", "bias") if biased else ("gain",)
        super().__init__(site, adapters, module)
        for name, tensor in _plain(module, _find_one(site, module)).items():
            self.register_buffer(_buffer(name), tensor, persistent=False)

    def fresh(self, spec: NormTuning) -> dict[str, Tensor]:
        """Return `gain (1, F)` and `bias (1, F)`, zero."""
        device = self.owner("gain").device
        return {tensor: torch.zeros(1, self.site.out_features, device=device) for tensor in self.tensors}

    def change(self, x: Tensor, y: Tensor, weights: Tensor, call: Call | None) -> Tensor:
        """Return the normalised input times the weighted change of the gain, plus that of the bias."""
        gain, *bias = (
            over_features(weigh(self.spread(weights, tensor), self.stack(tensor).to(y.dtype), self.site.path), x, y)
            for tensor in self.tensors
        )
        module = self._module[0]
        # made once, and cast again only where base and bank differ
        plain = {name: self.get_buffer(_buffer(name)).to(parameter) for name, parameter in module.named_parameters()}
        delta = _normalised(module, x, plain).to(y.dtype) * gain
        return delta + bias[0] if bias else delta

    def delta(self, weights: Tensor) -> Delta:
        """Return the change of the gain, (F,), and of the bias.

        Raises:
            NotMergeable: The norm has no place for a bias.
        """
        biased = "bias" in self.tensors
        if biased and "bias" not in self._module[0]._parameters:
            raise NotMergeable(
                f"{self.site.path} is a {type(self._module[0]).__name__}, which has no bias that could hold a change; "
                "use NormTuning(bias='existing')"
            )
        return self.full_delta(self.blend(weights, "gain"), self.blend(weights, "bias") if biased else None)


def _plain(module: nn.Module, one: float) -> dict[str, Tensor]:
    """Return what a norm's parameters are without gain and bias.

    Args:
        module: The norm.
        one: The stored value that is a gain of one.
    """
    parameters = dict(module.named_parameters())
    return {name: torch.full_like(p, one if name == "weight" else 0.0) for name, p in parameters.items()}


def _buffer(name: str) -> str:
    """Return the name of the buffer that stands for a parameter."""
    return f"plain_{name}".replace(".", "_")


def _normalised(module: nn.Module, x: Tensor, plain: dict[str, Tensor]) -> Tensor:
    """Return what a norm makes of its input with other parameters, such as those of `_plain`."""
    found: Tensor = functional_call(module, plain, (x,))
    return found


def _find_one(site: Site, module: nn.Module) -> float:
    """Find the stored value that is a gain of one: 1, or 0 in norms that store the distance from one."""
    inputs = [p for p in inspect.signature(module.forward).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    weight = module.get_parameter("weight")
    if weight.is_meta:
        return 1.0  # nothing is computed there
    x = torch.linspace(-1, 2, site.in_features, dtype=weight.dtype, device=weight.device).unsqueeze(0)
    if len(inputs) == 1:
        with torch.no_grad():
            zero, one, two = (_normalised(module, x, _plain(module, stored)) for stored in (0.0, 1.0, 2.0))
        if not zero.any() and torch.allclose(two, 2 * one, rtol=0.02):
            return 1.0
        if torch.allclose(one, 2 * zero, rtol=0.02) and torch.allclose(two, 3 * zero, rtol=0.02):
            return 0.0
    raise ValueError(
        f"{site.path} is a {type(module).__name__}, whose output is not its normalised input times its gain; leave it "
        "out of the placement, by modules"
    )
