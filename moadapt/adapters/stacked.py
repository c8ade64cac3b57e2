"""Banks that stack the tensors of their adapters along the first axis.

Shared and expert adapters, trained and frozen ones, are separate parameters, such as `shared_down` and `expert_down`,
so that an optimiser never moves what has no gradient. Adapters may have different numbers of rows.
"""

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from moadapt.adapters.bank import Adapter, Bank
from moadapt.adapters.delta import Delta, NotMergeable
from moadapt.adapters.stored_tensors import check_known, check_tensors
from moadapt.adapters.weighing import all_weights
from moadapt.call import Call
from moadapt.quantised import dequantised, is_quantised
from moadapt.routing import Routing
from moadapt.sites import Site

PARTS = ("shared", "shared_frozen", "expert", "frozen")  # what every input uses comes first


class StackedBank(Bank):
    """All adapters of one family at one site, each tensor stacked along its first axis.

    Args:
        site: Where.
        adapters: Shared first, then experts.
        module: The frozen module there.
    """

    tensors: tuple[str, ...]
    """Names of an adapter's tensors; a family with options sets those that it needs before it builds the stack."""
    vectors: ClassVar[frozenset[str]] = frozenset()
    """Those among them that weight decay leaves alone."""
    fixed: ClassVar[frozenset[str]] = frozenset()
    """Those among them that are never trained."""
    indexed: tuple[str, ...] = ()
    """Those among them whose rows `adapter_of` tells apart by adapter."""

    def __init__(self, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> None:
        super().__init__()
        self.site = site
        self._module = (module,)  # in a tuple, so that it is no submodule
        self._adapters: dict[str, list[Adapter]] = {part: [] for part in PARTS}
        self._sizes: dict[str, dict[str, int]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for part in PARTS:
            for name in self.tensors:
                self.register_parameter(f"{part}_{name}", None)
        for name in self.tensors:
            self.register_buffer(f"owner_{name}", torch.empty(0, dtype=torch.long), persistent=False)
        self._extend("shared", [a for a in adapters if a.expert is None])
        self._extend("expert", [a for a in adapters if a.expert is not None])

    @abstractmethod
    def fresh(self, spec: Any) -> dict[str, Tensor]:
        """Return the tensors of an untrained adapter, each with a leading axis to stack along.

        Args:
            spec: What the user wrote.
        """

    @abstractmethod
    def change(self, x: Tensor, y: Tensor, weights: Tensor, call: Call | None) -> Tensor:
        """Return the delta.

        Args:
            x: Input of the site, with row and token axes.
            y: The frozen output there, likewise.
            weights: Weight of the shared adapter, always 1, then those of the experts, (B|1, T|1, H|1, 1 + E).
            call: The pass that this is part of.
        """

    @property
    def names(self) -> tuple[str, ...]:
        """Names in stacking order."""
        return tuple(adapter.name for adapter in self._in_order())

    @property
    def has_experts(self) -> bool:
        """Whether the stack holds experts."""
        return self._most >= 0

    def forward(self, x: Tensor, y: Tensor, routing: Routing | None, call: Call | None = None) -> Tensor:
        """Return the delta, shaped as `y`."""
        if not self.names:
            return torch.zeros_like(y)
        flat = y.ndim == 2
        if flat:
            x, y = x.unsqueeze(0), y.unsqueeze(0)
        delta = self.change(x, y, all_weights(routing, y), call)
        return delta.squeeze(0) if flat else delta

    def state(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one adapter."""
        part = self._part_of(name)
        return {tensor: self._slice(part, name, tensor).detach().clone() for tensor in (*self.tensors, *self.common)}

    def live(self, name: str, tensor: str) -> Tensor:
        """Return a tensor of one adapter, through which gradients reach it."""
        return self._slice(self._part_of(name), name, tensor)

    def load_state(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors of one adapter in."""
        own = {tensor: self.live(name, tensor).detach() for tensor in (*self.tensors, *self.common)}
        check_tensors(self.site.path, name, own, tensors)
        for tensor, value in own.items():
            value.copy_(tensors[tensor])

    def grow(self, adapter: Adapter) -> None:
        """Append one expert to the stack."""
        self._extend("expert", [adapter])

    def trim(self, keep: Sequence[str]) -> None:
        """Drop the experts that are not in `keep`; the kept ones are renumbered in its order."""
        states = {name: self.state(name) for name in self.names}
        for part in ("expert", "frozen"):
            kept = sorted((a for a in self._adapters[part] if a.name in keep), key=lambda a: keep.index(a.name))
            renumbered = [Adapter(a.name, a.spec, keep.index(a.name)) for a in kept]
            self._set(part, renumbered, [states[adapter.name] for adapter in kept])
        self._reindex()

    def freeze(self, name: str) -> None:
        """Move one adapter to the frozen stack of its kind."""
        part = self._part_of(name)
        if part in ("shared_frozen", "frozen"):
            return
        target = "shared_frozen" if part == "shared" else "frozen"
        stay = [adapter for adapter in self._adapters[part] if adapter.name != name]
        frozen = [*self._adapters[target], *(a for a in self._adapters[part] if a.name == name)]
        states = {n: self.state(n) for n in self.names}
        self._set(target, frozen, [states[adapter.name] for adapter in frozen])
        self._set(part, stay, [states[adapter.name] for adapter in stay])
        self._reindex()

    def with_copies(self, count: int, num_experts: int) -> Self:
        """Return a twin in which the shared adapter stands several times, as experts behind the others."""
        twin = copy.copy(self)
        for held in ("_parameters", "_buffers", "_adapters"):
            vars(twin)[held] = dict(vars(self)[held])
        behind = [replace(a, expert=num_experts + index) for a in self._adapters["shared"] for index in range(count)]
        twin._adapters |= {"shared": [], "expert": [*self._adapters["expert"], *behind]}
        for tensor in self.tensors:
            twin._parameters[f"shared_{tensor}"] = None
            del twin._parameters[f"expert_{tensor}"]  # a tensor stands there while it is in use, see `take`
        twin._reindex()
        return twin

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained of the shared adapter alone, by name of the tensor."""
        found = {tensor: self._parameters[f"shared_{tensor}"] for tensor in self.tensors}
        return {tensor: parameter for tensor, parameter in found.items() if parameter is not None}

    def take(self, own: Self, copies: Mapping[str, Tensor]) -> None:
        """Stand, as the twin that it is, on the tensors of a bank and on copies of its shared adapter.

        Args:
            own: Whose twin it is.
            copies: By name of the tensor, (copies, R, ...).
        """
        for tensor, copied in copies.items():
            experts = own._parameters[f"expert_{tensor}"]
            parts = ([] if experts is None else [experts]) + [copied.flatten(0, 1)]
            vars(self)[f"expert_{tensor}"] = torch.cat(parts)
        self.training = own.training
        if self.is_gated:
            self._find_scales()

    @property
    def is_gated(self) -> bool:
        """Whether constants, which may change while a fit runs, multiply what any of the adapters adds."""
        return False

    def expert_rows(self) -> dict[str, Tensor]:
        """Return the expert of every row of the expert stacks."""
        if not self._adapters["expert"]:
            return {}
        return {
            f"expert_{tensor}": self._owners(tensor, ("expert",)) for tensor in self.tensors if tensor not in self.fixed
        }

    def undecayed(self) -> frozenset[str]:
        """Return the parameters of tensors that are vectors."""
        return frozenset(f"{part}_{tensor}" for part in PARTS for tensor in self.vectors)

    def stack(self, tensor: str) -> Tensor:
        """Return a tensor of all adapters, shared first, stacked along its first axis."""
        found = [getattr(self, f"{part}_{tensor}") for part in PARTS]
        parts = [part for part in found if part is not None]
        if not parts:
            return torch.empty(0, *self._shapes.get(tensor, ()), device=self.owner(tensor).device)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def owner(self, tensor: str) -> Tensor:
        """Return whose each stacked row is: the index of its expert, -1 for the shared adapter, (R,)."""
        found = getattr(self, f"owner_{tensor}")
        assert isinstance(found, Tensor), "a buffer"
        return found

    def adapter_of(self, tensor: str) -> Tensor:
        """Return to which adapter each stacked row of an indexed tensor belongs, (R,), counting those that have any."""
        return self.get_buffer(f"adapter_of_{tensor}")

    def counts(self, tensor: str) -> list[int]:
        """Return how many rows of an indexed tensor each adapter has, those that have any in stacking order."""
        return self._row_counts[tensor]

    def spread(self, weights: Tensor, tensor: str) -> Tensor:
        """Return the weight of each stacked row.

        Args:
            weights: As `change` gets them.
            tensor: Whose rows.

        Returns:
            (B|1, T|1, H|1, R).
        """
        absent = int(self._most) + 2 - weights.shape[-1]  # a routing may know fewer experts than were grown
        return functional.pad(weights, (0, max(0, absent))).index_select(-1, self.owner(tensor) + 1)

    def row_weights(self, weights: Tensor, tensor: str) -> Tensor:
        """Return the weight of each stacked row where weights are fixed, (R,).

        Args:
            weights: Weight of every expert, (E,).
            tensor: Whose rows.
        """
        stacked = self.stack(tensor)
        return self.spread(all_weights(Routing.constant(weights.to(stacked)), stacked), tensor)[0, 0, 0]

    def blend(self, weights: Tensor, tensor: str) -> Tensor:
        """Return the weighted sum of the rows where weights are fixed, (F,).

        Args:
            weights: Weight of every expert, (E,).
            tensor: Whose rows.
        """
        return self.row_weights(weights, tensor) @ self.stack(tensor).detach()

    def full_delta(self, dense: Tensor | None = None, bias: Tensor | None = None) -> Delta:
        """Return a delta without low-rank part.

        Args:
            dense: (F, D), or (F,) for a norm.
            bias: (F,).
        """
        like: Any = bias if dense is None else dense
        return Delta(like.new_zeros(0, self.site.in_features), like.new_zeros(0, self.site.out_features), dense, bias)

    def frozen_map(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight, (F, D), and the bias of the frozen linear layer, in float32 or finer, dequantised.

        Raises:
            NotMergeable: The weight is quantised in a way that is not known.
        """
        module = self._module[0]
        weight, bias = dequantised(module) if is_quantised(module) else module.weight, module.bias
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise NotMergeable(
                f"{self.site.path} keeps its weight as {getattr(weight, 'dtype', type(weight))}, from which no change "
                "can be computed; load the base unquantised, or quantised by torchao or bitsandbytes"
            )
        exact = torch.promote_types(weight.dtype, torch.float32)
        matrix = weight.T if isinstance(self._module[0], Conv1D) else weight
        return matrix.detach().to(exact), bias.detach().to(exact) if isinstance(bias, Tensor) else None

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the adapters that no optimiser reaches."""
        return frozenset(a.name for part in PARTS if "frozen" in part for a in self._adapters[part])

    def each_row(self, tensor: str, number: Callable[[Adapter], float]) -> Tensor:
        """Return for every stacked row of a tensor a number of its adapter, such as a scale, in float64, (R,)."""
        values = [number(adapter) for adapter in self._in_order() for _ in range(self._sizes[adapter.name][tensor])]
        return torch.tensor(values, dtype=torch.float64, device=self.owner(tensor).device)

    def _find_scales(self) -> None:
        """Find what follows the stack and its device but is never rounded to a coarser type; by default nothing."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move everything."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._find_scales()
        return self

    def _in_order(self) -> list[Adapter]:
        return [adapter for part in PARTS for adapter in self._adapters[part]]

    def _extend(self, part: str, adapters: list[Adapter]) -> None:
        """Append fresh adapters to a part of the stack."""
        old = self._adapters[part]
        states = [self.state(adapter.name) for adapter in old]
        self._set(part, [*old, *adapters], [*states, *(self.fresh(adapter.spec) for adapter in adapters)])
        self._reindex()

    def _set(self, part: str, adapters: list[Adapter], states: list[dict[str, Tensor]]) -> None:
        self._adapters[part] = adapters
        like: Tensor = next(self.parameters(), torch.empty(0, device=self.owner(self.tensors[0]).device))
        for adapter, state in zip(adapters, states, strict=True):
            self._sizes[adapter.name] = {tensor: len(state[tensor]) for tensor in self.tensors}
            self._shapes |= {tensor: tuple(state[tensor].shape[1:]) for tensor in self.tensors}
        for tensor in self.tensors:
            stacked = torch.cat([state[tensor].to(like) for state in states]) if states else None
            trained = "frozen" not in part and tensor not in self.fixed
            parameter = None if stacked is None else nn.Parameter(stacked, requires_grad=trained)
            setattr(self, f"{part}_{tensor}", parameter)

    def _reindex(self) -> None:
        self._index()
        self._find_scales()

    def _index(self) -> None:
        """Rebuild the maps from stacked rows to experts and to adapters."""
        self._most = max((a.expert for a in self._in_order() if a.expert is not None), default=-1)
        for tensor in self.tensors:
            setattr(self, f"owner_{tensor}", self._owners(tensor, PARTS).to(self.owner(tensor).device))
        sizes = {tensor: [self._sizes[name][tensor] for name in self.names] for tensor in self.indexed}
        self._row_counts = {tensor: [size for size in own if size] for tensor, own in sizes.items()}
        for tensor, counts in self._row_counts.items():
            places = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.long))
            self.register_buffer(f"adapter_of_{tensor}", places.to(self.owner(tensor).device), persistent=False)

    def _owners(self, tensor: str, parts: Sequence[str]) -> Tensor:
        adapters = [adapter for part in parts for adapter in self._adapters[part]]
        owners = [-1 if adapter.expert is None else adapter.expert for adapter in adapters]
        repeats = torch.tensor([self._sizes[adapter.name][tensor] for adapter in adapters], dtype=torch.long)
        return torch.tensor(owners, dtype=torch.long).repeat_interleave(repeats)

    def _part_of(self, name: str) -> str:
        check_known(self.site.path, name, self.names)
        return next(part for part in PARTS if any(adapter.name == name for adapter in self._adapters[part]))

    def _slice(self, part: str, name: str, tensor: str) -> Tensor:
        if tensor in self.common:
            return self.get_parameter(tensor)
        start = 0
        for adapter in self._adapters[part]:
            stop = start + self._sizes[adapter.name][tensor]
            if adapter.name == name:
                return self._part(part, tensor)[start:stop]
            start = stop
        raise AssertionError(f"{name} is in part {part}")

    def _part(self, part: str, tensor: str) -> Tensor:
        parameter = getattr(self, f"{part}_{tensor}")
        assert isinstance(parameter, Tensor), f"part {part} of {self.site.path} is empty"
        return parameter
