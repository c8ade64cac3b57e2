"""Any tuner of the peft library as an adapter: `y + w (tuner(x) - y)`, with `y` the frozen layer's output.

peft implements some thirty kinds of tuner well; here one family hosts them all. Each adapter is a tuner of its own over
all of its sites, so that what its layers share is shared, and never one of several in a tuner, whose switching routing
would fight with. Axes: B rows, T tokens, D in, F out, E experts, H heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from moadapt.adapters.bank import Adapter, Bank
from moadapt.adapters.delta import Delta, NotMergeable
from moadapt.adapters.family import FamilySpec
from moadapt.adapters.peft_hosting import added, host, merged, other_tensors
from moadapt.adapters.peft_kinds import as_json, check_kind, config
from moadapt.adapters.stored_tensors import check_known, check_tensors
from moadapt.adapters.weighing import all_weights, by_feature
from moadapt.call import Call
from moadapt.registry import FAMILIES
from moadapt.routing import Routing
from moadapt.sites import Site


@FAMILIES.register("peft")
@dataclass(frozen=True, kw_only=True)
class PeftTuner(FamilySpec):
    """Any other tuner of the peft library, such as VERA, OFT or LORA with DoRA.

    Args:
        kind: Name of a `peft.PeftType`, such as `VERA`; the documentation lists which can be hosted.
        options: Settings of peft's configuration of that kind, such as `{"r": 64}`; placement and training are not
            among them.

    Raises:
        ValueError: The kind cannot be hosted, with the reason, or an option is unknown or refused by peft.
    """

    kind: str = "LOHA"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    routes = frozenset({"row", "token", "heads"})

    def __post_init__(self) -> None:
        """Check kind and options."""
        object.__setattr__(self, "options", as_json(self.options))
        config(self.kind, self.options, ["linear"])

    @classmethod
    def bank(cls, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> "PeftBank":
        """Build the tuners of one site."""
        return cls.banks({site: (adapters, module)})[site]

    @classmethod
    def banks(cls, sites: Mapping[Site, tuple[Sequence[Adapter], nn.Module]]) -> "dict[Site, PeftBank]":  # type: ignore[override]
        """Build one tuner an adapter over all of its sites."""
        found = {site: PeftBank(site, module) for site, (_, module) in sites.items()}
        for adapter in dict.fromkeys(adapter.name for adapters, _ in sites.values() for adapter in adapters):
            here = {site: a for site, (adapters, _) in sites.items() for a in adapters if a.name == adapter}
            spec = _spec(next(iter(here.values())))
            layers = host(spec.kind, spec.options, {site: sites[site][1] for site in here})
            for site, layer in layers.items():
                found[site].add(here[site], layer)
        return found

    @classmethod
    def grow(cls, banks: Mapping[Site, Bank], adapter: Adapter) -> None:
        """Build one tuner over all sites of the new adapter."""
        known = {site: bank for site, bank in banks.items() if isinstance(bank, PeftBank)}
        spec = _spec(adapter)
        layers = host(spec.kind, spec.options, {site: bank.module for site, bank in known.items()})
        for site, bank in known.items():
            bank.add(adapter, layers[site])


class PeftBank(Bank):
    """The layers that tuners have at one site, one an adapter.

    Args:
        site: Where.
        module: The frozen module there.
    """

    reads_output = True

    def __init__(self, site: Site, module: nn.Module) -> None:
        super().__init__()
        self.site = site
        self.layers = nn.ModuleList()
        self._module = (module,)  # in a tuple, so that it is no submodule
        self._adapters: list[Adapter] = []
        self._frozen: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """Names, the shared adapter first."""
        return tuple(adapter.name for adapter in self._adapters)

    @property
    def has_experts(self) -> bool:
        """Whether any but the shared adapter is here."""
        return any(adapter.expert is not None for adapter in self._adapters)

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the adapters that no optimiser reaches."""
        return frozenset(self._frozen & set(self.names))

    @property
    def module(self) -> nn.Module:
        """The frozen module."""
        return self._module[0]

    def add(self, adapter: Adapter, layer: nn.Module) -> None:
        """Take in an adapter.

        Args:
            adapter: Whose.
            layer: Its tuner's layer here.
        """
        self._adapters.append(adapter)
        self.layers.append(layer.train(self.training))

    def forward(self, x: Tensor, y: Tensor, routing: Routing | None, call: Call | None = None) -> Tensor:
        """Return the weighted sum of what the tuners change, shaped as `y`."""
        flat = y.ndim == 2
        if flat:
            x, y = x.unsqueeze(0), y.unsqueeze(0)
        weights, used = all_weights(routing, y), None if routing is None else routing.used()
        total = torch.zeros_like(y)
        for adapter, layer in zip(self._adapters, self.layers, strict=True):
            if adapter.expert is None:
                total = total + added(layer, x, y)
            elif used is not None and adapter.expert < len(used) and used[adapter.expert]:
                weight = by_feature(weights[..., adapter.expert + 1], y.shape[-1], self.site.path).to(y.dtype)
                total = total + weight * added(layer, x, y)
            elif torch.is_grad_enabled():
                # no part of the result, but of the graph: processes must agree on which parameters have gradients
                total = total + sum(p.flatten()[:0].sum() for p in layer.parameters() if p.requires_grad)
        total = total.to(y.dtype)
        return total.squeeze(0) if flat else total

    def delta(self, weights: Tensor) -> Delta:
        """Return the weighted sum of what peft's own merges change."""
        site = self.site
        dense = torch.zeros(site.out_features, site.in_features, device=weights.device)
        bias: Tensor | None = None
        for adapter, layer in zip(self._adapters, self.layers, strict=True):
            kind = _spec(adapter).kind
            known = check_kind(kind)
            if not known.mergeable:
                raise NotMergeable(
                    f"{site.path}: peft's {kind} of adapter {adapter.name!r} is no affine map of the layer's input, "
                    "so no weight can hold it; deploy the mixture itself, or use another kind"
                )
            weight = 1.0 if adapter.expert is None else float(weights[adapter.expert :][:1].sum())  # 0 if it knows none
            if weight:
                change, shift = merged(layer, adds_bias=known.adds_bias)
                dense = dense.to(change) + weight * change
                if shift is not None:
                    bias = weight * shift + (0 if bias is None else bias)
        none = dense.new_zeros(0, site.in_features), dense.new_zeros(0, site.out_features)
        return Delta(*none, dense=dense, bias=bias)

    def state(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one adapter; what its layers share is found at its first site."""
        return {key: tensor.detach().clone() for key, tensor in self._tensors(name).items()}

    def load_state(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors of one adapter in."""
        known = self._tensors(name)
        check_tensors(self.site.path, name, known, tensors)
        for key, own in known.items():
            if isinstance(own, nn.Parameter):
                own.data.copy_(tensors[key])
            else:
                own.data = tensors[key].to(own.device, copy=True)

    def grow(self, adapter: Adapter) -> None:
        """Add one adapter, whose tuner has only this site; `PeftTuner.grow` builds one over many."""
        PeftTuner.grow({self.site: self}, adapter)

    def trim(self, keep: Sequence[str]) -> None:
        """Drop the experts that are not in `keep`; the kept ones are renumbered in its order."""
        known = dict(zip(self._adapters, self.layers, strict=True))
        experts = sorted(
            (a for a in known if a.expert is not None and a.name in keep), key=lambda a: keep.index(a.name)
        )
        kept = [*(a for a in known if a.expert is None), *experts]
        self.layers = nn.ModuleList(known[adapter] for adapter in kept)
        self._adapters = [a if a.expert is None else replace(a, expert=keep.index(a.name)) for a in kept]

    def freeze(self, name: str) -> None:
        """Let no optimiser reach an adapter."""
        self._layer(name).requires_grad_(False)
        self._frozen.add(name)

    def expert_rows(self) -> dict[str, Tensor]:
        """Return the expert of every row of the experts' parameters: one for each."""
        return {
            f"layers.{index}.{name}": torch.full((len(parameter),), adapter.expert)
            for index, (adapter, layer) in enumerate(zip(self._adapters, self.layers, strict=True))
            if adapter.expert is not None
            for name, parameter in layer.named_parameters()
            if parameter.requires_grad
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PeftBank":
        """Move everything, tensors that peft keeps as plain attributes too."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for layer in self.layers:
            for _, place, key in other_tensors(layer):
                place[key] = fn(place[key])
        return self

    def _layer(self, name: str) -> nn.Module:
        check_known(self.site.path, name, self.names)
        return self.layers[self.names.index(name)]

    def _tensors(self, name: str) -> dict[str, Tensor]:
        layer = self._layer(name)
        others = {key: place[inner] for key, place, inner in other_tensors(layer)}
        return {**dict(layer.named_parameters()), **dict(layer.named_buffers()), **others}


def _spec(adapter: Adapter) -> PeftTuner:
    assert isinstance(adapter.spec, PeftTuner), "the mixture groups adapters by family"
    return adapter.spec
