"""All LoRAs of one site, stacked along the rank axis; ranks may differ.

Axes: B rows, T tokens, D in, F out, E experts, K chosen, H heads, R stacked ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from moadapt.adapters.bank import Adapter
from moadapt.adapters.blending import add_blended, blended_delta, check_experts
from moadapt.adapters.delta import Delta, Factors
from moadapt.adapters.initial import Initial, Layer, is_filled_later
from moadapt.adapters.initial.plain import Uniform
from moadapt.adapters.lowrank import Ranks, add_gathered, add_stacked, stacked_linear, take_rows
from moadapt.adapters.stacked import PARTS, StackedBank
from moadapt.adapters.tiled import add_tiled
from moadapt.adapters.weighing import all_weights, check_heads, weigh_up
from moadapt.call import Call
from moadapt.quantised import is_quantised
from moadapt.routing import Routing
from moadapt.sites import Site


class LowRank(Protocol):
    """What a bank asks of the specs of its adapters."""

    def rank_at(self, site: Site) -> int:
        """Return the width of the bottleneck at a site."""

    @property
    def scale(self) -> float:
        """The factor s."""

    @property
    def dropout(self) -> float:
        """Share of inputs dropped in training."""

    @property
    def initial(self) -> Initial:
        """Where the factors begin."""

    @property
    def lr_ratio(self) -> float:
        """Learning rate of `up` over that of `down`."""


class LoRABank(StackedBank):
    """All LoRAs of one site, stacked along the rank axis.

    Args:
        site: Where.
        adapters: Shared first, then experts.
        module: The frozen module there.

    Raises:
        ValueError: The adapters of the site ask for different dropouts.
    """

    fixed = frozenset({"start_down", "start_up"})
    beside: ClassVar[tuple[str, ...]] = ()
    """Names of tensors that an adapter has beside its factors."""
    slots: Tensor

    def __init__(self, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> None:
        dropouts = {spec_of(adapter).dropout for adapter in adapters}
        if len(dropouts) > 1:
            raise ValueError(
                f"{site.path}: LoRAs of one site share a dropout mask, got {sorted(dropouts)}; make them equal"
            )
        self._shifts = spec_of(adapters[0]).initial.shifts
        self._sides = ("down", "up", "start_down", "start_up") if self._shifts else ("down", "up")
        self.tensors = (*self._sides, *self.beside)
        self._started: set[str] = set()
        self._gates: dict[str, float] = {}
        self._quantised = is_quantised(module)  # asked once, as compiled code cannot tell
        self._known: dict[type, tuple[Tensor, ...]] = {}
        super().__init__(site, adapters, module)
        self._known.clear()
        self.dropout, self.lr_ratio = dropouts.pop(), spec_of(adapters[0]).lr_ratio

    def fresh(self, spec: LowRank) -> dict[str, Tensor]:
        """Return `down (r, D)` and `up (r, F)`, and the same again where a frozen term takes them off."""
        initial = Uniform() if spec.initial.reads_inputs or is_filled_later() else spec.initial
        return self._begin(*initial.factors(self._layer(spec)))

    @property
    def waiting(self) -> frozenset[str]:
        """Names of adapters whose start reads inputs, and that were neither started nor loaded."""
        read = {adapter.name for adapter in self._in_order() if spec_of(adapter).initial.reads_inputs}
        return frozenset(read - self._started)

    def start(self, inputs: Tensor) -> None:
        """Start the adapters that wait for it."""
        for adapter in self._in_order():
            if adapter.name in self.waiting:
                spec = spec_of(adapter)
                layer = replace(self._layer(spec), inputs=inputs)
                started = self._begin(*spec.initial.factors(layer))
                self.load_state(adapter.name, {**self.state(adapter.name), **started})
        self._known.clear()

    def load_state(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors of one adapter in, which then waits for nothing."""
        super().load_state(name, tensors)
        self._started.add(name)
        self._waits = bool(self.waiting)

    def _layer(self, spec: LowRank) -> Layer:
        site, device = self.site, self.owner("down").device
        rank = spec.rank_at(site)
        weight = lambda: self.frozen_map()[0]  # noqa: E731, only starts that read the weight take it
        return Layer(site.in_features, site.out_features, rank, spec.scale, device, weight, known=self._known)

    def grow(self, adapter: Adapter) -> None:
        """Append one expert to the stack."""
        super().grow(adapter)
        self._known.clear()

    def _begin(self, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        """Return an adapter's tensors at its start; a base that is only shapes starts at zero."""
        device = self.owner("down").device
        down, up = (torch.zeros_like(side, device=device) if side.is_meta else side for side in (down, up))
        return {name: up if name.endswith("up") else down for name in self._sides}

    def forward(self, x: Tensor, y: Tensor, routing: Routing | None, call: Call | None = None) -> Tensor:
        """Return the delta, shaped as `y`."""
        return self.add_to(torch.zeros_like(y), x, routing, call)

    def change(self, x: Tensor, y: Tensor, weights: Tensor, call: Call | None) -> Tensor:
        """Return the delta in its plainest form."""
        down, up = self.factors(y.dtype)
        spread = self.spread(weights, "rank") * self._ranks.scale(weights.dtype)
        return weigh_up(self.shrink(x, down), spread, up, self.site.path)

    def shrink(self, x: Tensor, down: Tensor) -> Tensor:
        """Map the site's input to the stacked ranks.

        Args:
            x: Input of the site, with row and token axes.
            down: (R, D).

        Returns:
            (B, T, R).
        """
        return x.to(down.dtype) @ down.T

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return `down (R, D)` and `up (R, F)` of all adapters; frozen terms follow those that they belong to.

        Args:
            dtype: What to compute in.

        Raises:
            ValueError: An adapter is trained before it got the inputs to start from.
        """
        if self._waits and self.training:
            raise ValueError(
                f"{self.site.path}: {', '.join(sorted(self.waiting))} starts from data; call "
                "moadapt.initialise(mixture, batches) before training"
            )
        if not self._shifts:
            return self.stack("down").to(dtype), self.stack("up").to(dtype)
        downs, ups = [], []
        for part in PARTS:
            if self._adapters[part]:
                down, up, first_down, first_up = (self._part(part, name) for name in self._sides)
                downs += [down, down - first_down]
                ups += [up - first_up, first_up]
        return torch.cat(downs).to(dtype), torch.cat(ups).to(dtype)

    def add_to(self, y: Tensor, x: Tensor, routing: Routing | None, call: Call | None = None) -> Tensor:
        """Add the delta to `y` in place, in the cheapest exact form."""
        if not self.names:
            return y
        if self._quantised:
            y = y.clone()  # its library's own backward may not allow writing to it
        x = functional.dropout(x.to(y.dtype), self.dropout, self.training)
        down, up = self.factors(y.dtype)
        flat = x.ndim == 2
        y3, x3 = (y.unsqueeze(0), x.unsqueeze(0)) if flat else (y, x)
        if routing is not None and routing.combines == "parameters":
            out = add_blended(self, y3, x3, routing)
        elif routing is not None and routing.weights.shape[2] > 1:
            out = y3 + self.change(x3, y3, all_weights(routing, y3), call)
        elif routing is not None and self._gathers(routing):
            ranks, weights = self._chosen(routing)
            out = add_gathered(y3, x3, down, up, weights.to(y.dtype), ranks)
        elif routing is not None and self._tiles(routing):
            out = self._add_tiled(y3, x3, down, up, routing)
        else:
            out = add_stacked(y3, x3, down, up, _experts(routing), self._ranks)
        return out.squeeze(0) if flat else out

    def adapt(
        self, module: nn.Module, x: Tensor, routing: Routing | None, call: Call | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the base's module and add the delta; in training a plain linear layer joins the stacked form."""
        if args or kwargs or not self._fuses(module, x, routing):
            return super().adapt(module, x, routing, call, *args, **kwargs)
        assert isinstance(module, nn.Linear), "only plain linear layers are fused"
        down, up = self.factors(x.dtype)
        return stacked_linear(module, x, down, up, _experts(routing), self._ranks)

    def expert_outputs(self, x: Tensor, y: Tensor, num_experts: int, call: Call | None = None) -> Tensor:
        """Return what each expert adds, (B, T, E, F), by one product down and one up; without dropout."""
        down, up = self.factors(y.dtype)
        slots = functional.pad(self.slots, (0, 0, 0, num_experts - len(self.slots)), value=-1)
        ranks = slots.clamp(min=0).flatten()
        shrunk = (self.shrink(x, down) * self._ranks.scale(y.dtype)).index_select(-1, ranks)
        shrunk = shrunk.view(*shrunk.shape[:-1], *slots.shape) * (slots >= 0)
        return torch.einsum("...eq,eqf->...ef", shrunk, take_rows(up, ranks.view(slots.shape)))

    def delta(self, weights: Tensor) -> Delta:
        """Return the stacked factors in float32 or finer, the weights folded into `up`."""
        exact = torch.promote_types(self.stack("up").dtype, torch.float32)
        down, up = (side.detach() for side in self.factors(exact))
        spread = self._ranks.spread(weights.to(up.device).reshape(1, 1, -1), up.dtype)
        return Delta(down, up * spread.reshape(-1, 1))

    def delta_of_heads(self, routing: Routing) -> Delta:
        """Return the factors under fixed weights by head, or of blended parameters."""
        if routing.combines == "parameters":
            return blended_delta(self, routing)
        exact = torch.promote_types(self.stack("up").dtype, torch.float32)
        down, up = (side.detach() for side in self.factors(exact))
        weights = self.spread(all_weights(routing, up), "rank")[0, 0].to(up.dtype) * self._ranks.scale(up.dtype)
        check_heads(self.site.path, len(weights), self.site.out_features)
        slices = rearrange(up, "r (h f) -> r h f", h=len(weights)) * weights.T.unsqueeze(2)
        return Delta(down, slices.flatten(1))

    def check_blending(self, site: Site, num_experts: int, heads: int) -> None:
        """Refuse experts of which some are absent, or that differ in rank or scale; and other sites than linear."""
        if site.form != "linear":
            super().check_blending(site, num_experts, heads)
        check_experts(self, num_experts, heads)

    def low_rank(self) -> Factors:
        """Return the stacked factors, the scales folded into `up`."""
        down, up = self.factors(self.stack("up").dtype)
        owners = tuple(adapter.name for adapter in self._rows())
        return Factors(owners, down, up * self._ranks.scale(up.dtype).unsqueeze(1), self.frozen)

    @property
    def is_gated(self) -> bool:
        """Whether constants, which may change while a fit runs, multiply what any of the adapters adds."""
        return bool(self._gates)

    def gate(self, gates: Mapping[str, float]) -> None:
        """Multiply what adapters add by constants, until told otherwise; saved mixtures know nothing of them.

        Args:
            gates: By name of the adapter, from 0 to 1.
        """
        self._gates.update(gates)
        self._find_scales()

    def rates(self) -> dict[str, float]:
        """Return the factor of `up`."""
        return {f"{part}_up": self.lr_ratio for part in PARTS}

    def _index(self) -> None:
        """Rebuild the maps from stacked ranks to experts."""
        super()._index()
        device = self.owner("down").device
        owner = torch.tensor([-1 if a.expert is None else a.expert for a in self._rows()], dtype=torch.long)
        ranks = [(owner == expert).nonzero().flatten() for expert in range(self._most + 1)]
        slots = torch.full((len(ranks), max(map(len, ranks), default=0)), -1)
        for expert, own in enumerate(ranks):
            slots[expert, : len(own)] = own
        self._started &= set(self.names)  # a later adapter of the name of one that was trimmed starts anew
        self._waits = bool(self.waiting)
        self.register_buffer("slots", slots.to(device), persistent=False)
        self.register_buffer("owner_rank", owner.to(device), persistent=False)
        self._shared_ranks = int((owner < 0).sum())

    def _rows(self) -> list[Adapter]:
        """Whose every stacked rank is."""
        found: list[Adapter] = []
        for part in PARTS:
            own = [adapter for adapter in self._adapters[part] for _ in range(self._sizes[adapter.name]["down"])]
            found += own * (2 if self._shifts else 1)
        return found

    def _find_scales(self) -> None:
        """Find whose the stacked ranks are and their scales, gates included."""
        rows = self._rows()
        scales = [spec_of(a).scale * self._gates.get(a.name, 1.0) for a in rows]
        scale = torch.tensor(scales, dtype=torch.float64, device=self.owner("down").device)
        owners = [a.expert for a in rows if a.expert is not None]
        self._ranks = Ranks(self._shared_ranks, torch.tensor(owners, dtype=torch.long), scale)

    def _fuses(self, module: nn.Module, x: Tensor, routing: Routing | None) -> bool:
        """Tell whether one step can hold the base's product too: nobody hooks into it, casts or compiles it."""
        if type(module) is not nn.Linear or x.ndim != 3 or not self.names or (self.dropout and self.training):
            return False
        if self._quantised:
            return False
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks) or "forward" in vars(module) or any(p.requires_grad for p in module.parameters()):
            return False
        if module.weight.dtype != x.dtype or x.is_meta or torch.is_autocast_enabled(x.device.type):
            return False
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return False
        return routing is None or not (
            routing.combines == "parameters"
            or routing.weights.shape[2] > 1
            or self._gathers(routing)
            or self._tiles(routing)
        )

    def _gathers(self, routing: Routing) -> bool:
        """Tell whether taking each row's ranks out of the stack is cheaper than using the whole stack."""
        if routing.indices is None or routing.per_token or not routing.per_row:
            return False
        taken = self._shared_ranks + routing.indices.shape[-1] * self.slots.shape[1]
        return 2 * taken <= len(self.owner("rank"))

    def _tiles(self, routing: Routing) -> bool:
        """Tell whether sorting tokens by the experts they chose is cheaper than using the whole stack.

        The stacked form costs as much as so many more columns of the layer; sorting, about an eighth of its width.
        """
        if routing.indices is None or not (routing.per_token and routing.per_row) or torch.compiler.is_compiling():
            return False
        experts = len(self.owner("rank")) - self._shared_ranks
        taken = routing.indices.shape[-1] * self.slots.shape[1]
        return 8 * experts > min(self.site.in_features, self.site.out_features) and 2 * taken <= experts

    def _add_tiled(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor, routing: Routing) -> Tensor:
        """Add the shared adapter's ranks for all tokens, then those of the chosen experts tile by tile."""
        shared = self._shared_ranks
        if shared:
            (first, down), (above, up) = (side.tensor_split([shared]) for side in (down, up))
            y = add_stacked(y, x, first, above, None, self._ranks.of_shared)
        slots = functional.pad(self.slots, (0, 0, 0, max(0, routing.num_experts - len(self.slots))), value=-1)
        ranks = slots.clamp(min=shared)
        scale = torch.where(slots >= 0, self._ranks.scale(y.dtype)[ranks], 0.0)
        weights, flat = routing.weights.flatten(0, 2).to(y.dtype), (y.flatten(0, 1), x.flatten(0, 1))
        return add_tiled(*flat, down, up, weights, ranks - shared, scale, routing.tiles).view(y.shape)

    def _chosen(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """Return the ranks each row takes, (B, N), and their weights, (B, 1, N)."""
        assert routing.indices is not None
        chosen, weights = routing.indices[:, 0, 0], routing.weights[:, 0, 0]
        slots = functional.pad(self.slots, (0, 0, 0, max(0, routing.num_experts - len(self.slots))), value=-1)[chosen]
        full = weights.unsqueeze(-1) * (slots >= 0)
        ranks, full = slots.clamp(min=0).flatten(1), full.flatten(1)
        shared = torch.arange(self._shared_ranks, device=ranks.device).expand(len(ranks), -1)
        ranks = torch.cat([shared, ranks], dim=1)
        full = torch.cat([full.new_ones(shared.shape), full], dim=1) * self._ranks.scale(full.dtype)[ranks]
        return ranks, full.unsqueeze(1)

    def shared_factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Return the shared adapter's `down (R, D)` and `up (R, F)`, its scale in `up`; None where there is none."""
        if not self._shared_ranks:
            return None
        down, up = (side[: self._shared_ranks] for side in self.factors(dtype))
        return down, up * self._ranks.scale(dtype)[: self._shared_ranks].unsqueeze(1)

    def experts(self) -> list[Adapter]:
        """Return the experts here in the order of their indices."""
        found = [adapter for part in ("expert", "frozen") for adapter in self._adapters[part]]
        return sorted(found, key=lambda adapter: adapter.expert or 0)

    def shape_of(self, adapter: Adapter) -> tuple[int, float]:
        """Return the rank of an adapter here and the factor of its product."""
        return spec_of(adapter).rank_at(self.site), spec_of(adapter).scale


def _experts(routing: Routing | None) -> Tensor | None:
    """Return the weights of the experts without the axis of heads, (B|1, T|1, E)."""
    return None if routing is None else routing.dense()[:, :, 0]


def spec_of(adapter: Adapter) -> LowRank:
    """Return what the user wrote for an adapter."""
    return cast(LowRank, adapter.spec)
