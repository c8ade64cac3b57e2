"""The mixture: one frozen base, the banks at its sites and the routers at their places.

`attach` puts wrappers in the place of the base's modules and hooks on the blocks that routers read; `detach` takes all of
it away and returns the very same base. Everything a forward pass needs to know travels in one `Call`.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from moadapt.adapted import AdaptedModule
from moadapt.adapters.family import Adapter, Bank, FamilySpec
from moadapt.call import Call, CallContext, images_match_rows, prompt_tokens
from moadapt.names import SHARED, check_names
from moadapt.places import Place, plan_places
from moadapt.registry import MERGES
from moadapt.routing import Router, RouterSpec, Routing, RoutingContext
from moadapt.sites import Anatomy, Placement, Site, anatomy
from moadapt.tracing import Trace

if TYPE_CHECKING:
    from moadapt.merging.report import MergeReport


@dataclass(frozen=True)
class MixtureSpec:
    """All that a user chose: enough, with a base, to build the mixture again.

    Args:
        experts: Experts by name, in order.
        shared: The adapter that every input uses.
        router: Gives the experts their weights.
        placement: Where adapters sit that name no placement of their own.
    """

    experts: Mapping[str, FamilySpec]
    shared: FamilySpec | None
    router: RouterSpec | None
    placement: Placement


@dataclass(frozen=True)
class _Request:
    """What the caller said, for every forward pass of the base until it is done."""

    task_ids: Tensor | None = None
    prompt_mask: Tensor | None = None
    prompt_length: int | None = None


class Mixture(nn.Module):
    """A frozen base with adapters and routers; made by `attach` or `load`.

    Args:
        base: Any transformers model; it is frozen and wrapped in place until `detach`.
        spec: What to attach.
    """

    def __init__(self, base: PreTrainedModel, spec: MixtureSpec) -> None:
        super().__init__()
        self.base = base
        self.spec = spec
        self.anatomy: Anatomy = anatomy(base)
        self.context = CallContext()
        self._adapters = _adapters(spec)
        self.sites = _sites(self.anatomy, self._adapters, spec.placement)
        self.places = self._plan()
        self.routers = nn.ModuleList(self._build_router(place) for place in self.places)
        self._place_of = {path: place for place in self.places for path in place.sites}
        self._index_of = {place.name: index for index, place in enumerate(self.places)}
        self._required_grad = {name: p.requires_grad for name, p in base.named_parameters()}
        self._was_training = base.training
        self._wrappers = {site.path: self._wrapper(site, adapters) for site, adapters in self.sites.items()}
        self._handles: list[RemovableHandle] = []
        self._request = _Request()
        self._prepared: Call | None = None
        self._override: Routing | None = None
        self._available: Tensor | None = None
        self._traces: list[Trace] = []
        self._held: WeakKeyDictionary[Any, dict[str, Routing]] = WeakKeyDictionary()
        base.requires_grad_(False)
        self._install()
        self.train(base.training)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names a row's task may have: those of the experts."""
        return tuple(self.spec.experts)

    def banks(self) -> Iterator[tuple[Site, Bank]]:
        """Iterate over every bank with its site."""
        for site in self.sites:
            for bank in self._wrappers[site.path].banks:
                assert isinstance(bank, Bank)
                yield site, bank

    def forward(
        self,
        *,
        task: str | Sequence[str] | Tensor | None = None,
        prompt_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """Run the base with its adapters, routed.

        Args:
            task: One name for all rows, one name a row, or indices (B,); optional where the router learned to do
                without.
            prompt_mask: Which tokens are prompt, (B, T); by default the tokens before each row's first label, without
                labels all real tokens.
            inputs: What the base takes.

        Returns:
            What the base returns.

        Raises:
            ValueError: A task is unknown, or labels lie on prompt tokens that the routing reads.
        """
        with self._requesting(_Request(self.task_ids(task), prompt_mask)):
            return self.base(**inputs)

    def generate(self, *, task: str | Sequence[str] | Tensor | None = None, **inputs: Any) -> Any:
        """Generate with the base's own `generate`; sequence routings are decided on the prompt and then held.

        Args:
            task: As in `forward`.
            inputs: What the base's `generate` takes.
        """
        tokens = next((inputs[n] for n in ("input_ids", "inputs", "inputs_embeds") if inputs.get(n) is not None), None)
        length = None if tokens is None else tokens.shape[1]
        with self._requesting(_Request(self.task_ids(task), prompt_length=length)):
            if any(site.tower != "language" for site in self.sites):
                # `generate` runs the vision tower before its first forward pass of the base.
                named = inputs if "inputs" not in inputs else {**inputs, "input_ids": tokens}
                self._prepared = self._start_call(named)
            return self.base.generate(**inputs)  # type: ignore[operator]

    def task_ids(self, task: str | Sequence[str] | Tensor | None) -> Tensor | None:
        """Turn task names into indices.

        Raises:
            ValueError: A name is unknown; the known ones are listed.
        """
        if task is None or not self.tasks:
            return None
        if isinstance(task, Tensor):
            if task.numel() and not 0 <= int(task.min()) <= int(task.max()) < len(self.tasks):
                raise ValueError(f"task indices go from 0 to {len(self.tasks) - 1}, got {task.tolist()}")
            return task
        names = [task] if isinstance(task, str) else list(task)
        unknown = sorted({name for name in names if name not in self.tasks})
        if unknown:
            raise ValueError(
                f"unknown task {', '.join(map(repr, unknown))}; this mixture knows {', '.join(self.tasks)}"
            )
        return torch.tensor([self.tasks.index(name) for name in names], device=self.base.device)

    @contextmanager
    def override(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Give every input these weights instead of the routers' within the `with` block.

        Args:
            weights: Weight by expert name; the others get 0.
        """
        self.task_ids(list(weights))
        before = self._override
        values = [float(weights.get(name, 0.0)) for name in self.tasks]
        self._override = Routing.constant(torch.tensor(values, device=self.base.device))
        try:
            yield
        finally:
            self._override = before

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the bare base within the `with` block, bit for bit."""
        before, self.context.enabled = self.context.enabled, False
        try:
            yield
        finally:
            self.context.enabled = before

    @contextmanager
    def only(self, experts: Sequence[str]) -> Iterator[None]:
        """Let routers choose among these experts only within the `with` block.

        Args:
            experts: Names, at least one.
        """
        chosen, before = self.task_ids(list(experts)), self._available
        if chosen is None or not len(chosen):
            raise ValueError(f"only() needs at least one expert; choose from {', '.join(self.tasks)}")
        self._available = torch.zeros(len(self.tasks), dtype=torch.bool, device=self.base.device)
        self._available[chosen] = True
        try:
            yield
        finally:
            self._available = before

    @contextmanager
    def trace(self) -> Iterator[Trace]:
        """Record every routing that is decided within the `with` block, per place, on the CPU."""
        trace = Trace(self.tasks)
        self._traces.append(trace)
        try:
            yield trace
        finally:
            self._traces.remove(trace)

    def train(self, mode: bool = True) -> "Mixture":
        """Switch adapters and routers; the base stays in evaluation mode, its dropout off and its buffers fixed.

        Args:
            mode: Training or evaluation.
        """
        self.training = mode
        self.base.eval()
        for module in (self.routers, *(wrapper.banks for wrapper in self._wrappers.values())):
            module.train(mode)
        for block in self.base.modules():
            if isinstance(block, GradientCheckpointingLayer) and block.gradient_checkpointing:
                block.training = mode
        return self

    def gradient_checkpointing_enable(self) -> None:
        """Recompute blocks in the backward pass; routings are restored there, not decided again.

        Raises:
            ValueError: A block applies dropout of its own, which could not be kept off.
        """
        for path, block in self.base.named_modules():
            rate = getattr(block, "dropout", 0.0)
            if isinstance(block, GradientCheckpointingLayer) and isinstance(rate, float) and rate > 0:
                raise ValueError(f"{path} applies dropout {rate} itself; set its dropout to 0 to checkpoint it")
        contexts = {"use_reentrant": False, "context_fn": self.context.checkpoint_contexts}
        self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=contexts)
        self.train(self.training)

    def save(self, folder: str | Path) -> None:
        """Write spec, adapters and routers, not the base.

        Args:
            folder: Made or replaced as a whole.
        """
        from moadapt.storage import save

        save(self, Path(folder))

    def merge(self, method: str, **options: Any) -> "tuple[PreTrainedModel, MergeReport]":
        """Fold the mixture into a plain model; the mixture stays usable.

        Args:
            method: Short name of a merge method.
            options: What the method takes, such as `task` and `calibration`.

        Returns:
            A new transformers model without adapters, and how far it is from the mixture.
        """
        plan = MERGES.get(method)().plan(self, **options)
        return plan.model(), plan.report()

    def export_peft(self, folder: str | Path, *, method: str = "task", **options: Any) -> "MergeReport":
        """Write the merged adapters as a plain PEFT LoRA folder.

        Args:
            folder: Made or replaced as a whole.
            method: Short name of a merge method.
            options: What the method takes.
        """
        from moadapt.hub.peft_folder import write_peft_folder

        plan = MERGES.get(method)().plan(self, **options)
        report: MergeReport = plan.report()
        write_peft_folder(Path(folder), self.base, plan.deltas)
        return report

    def detach(self) -> PreTrainedModel:
        """Take everything off the base and return it, as it was before `attach`."""
        self._uninstall()
        for name, parameter in self.base.named_parameters():
            parameter.requires_grad_(self._required_grad[name])
        return self.base.train(self._was_training)

    @contextmanager
    def bare_base(self) -> Iterator[PreTrainedModel]:
        """Give the base without wrappers and hooks within the `with` block, to copy or inspect it."""
        self._uninstall()
        try:
            yield self.base
        finally:
            self._install()

    def named_adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over all parameters that are not the base's, by name."""
        own = {id(p) for _, bank in self.banks() for p in bank.parameters()}
        own |= {id(p) for p in self.routers.parameters()}
        return ((name, p) for name, p in self.named_parameters() if id(p) in own)

    # Building

    def _plan(self) -> tuple[Place, ...]:
        with_experts = [site for site, here in self.sites.items() if any(a.expert is not None for a in here)]
        if self.spec.router is None:
            return ()
        return plan_places(self.base, self.anatomy, with_experts, self.spec.router)

    def _build_router(self, place: Place) -> Router:
        assert self.spec.router is not None
        router = self.spec.router.build(place.dim, len(self.spec.experts))
        return router.to(self.base.device)

    def _wrapper(self, site: Site, adapters: Sequence[Adapter]) -> AdaptedModule:
        module = self.base.get_submodule(site.path)
        families = dict.fromkeys(type(adapter.spec) for adapter in adapters)
        banks = [family.bank(site, [a for a in adapters if type(a.spec) is family]) for family in families]
        device = next(module.parameters()).device
        return AdaptedModule(module, [bank.to(device) for bank in banks], site, self.context, self._route)

    def _install(self) -> None:
        for path, wrapper in self._wrappers.items():
            _replace(self.base, path, wrapper)
        self._handles = [
            self.base.register_forward_pre_hook(self._open_call, with_kwargs=True),
            self.base.register_forward_hook(self._close_call, always_call=True),
        ]
        for block in dict.fromkeys(self._hooked_blocks()):
            self._handles.append(
                self.base.get_submodule(block).register_forward_pre_hook(self._block_hook(block), with_kwargs=True)
            )

    def _uninstall(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for path, wrapper in self._wrappers.items():
            _replace(self.base, path, wrapper.module)

    def _hooked_blocks(self) -> Iterator[str]:
        for place in self.places:
            if place.hook is not None:
                yield place.hook
                if place.before_language:
                    yield self.anatomy.tower("language").blocks[0]

    # One call

    @contextmanager
    def _requesting(self, request: _Request) -> Iterator[None]:
        before, self._request = self._request, request
        try:
            yield
        finally:
            self._request = before
            self._prepared = self.context.call = None

    def _open_call(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out, from the base's own inputs, what this pass is about."""
        if not self.context.enabled:
            return
        self._start_call(
            {**kwargs, **inspect.signature(base.forward).bind_partial(*args).arguments} if args else kwargs
        )

    def _start_call(self, inputs: Mapping[str, Any]) -> Call:
        call = self.context.call = self._read_inputs(inputs)
        if self._prepared is not None and not call.continues:
            times = call.num_rows // self._prepared.num_rows
            call.routings.update({p: r.repeat_rows(times) for p, r in self._prepared.routings.items()})
            call.images_match = self._prepared.images_match
        for trace in self._traces:
            trace.start(call.task_ids)
        for place, router in zip(self.places, self.routers, strict=True):
            if isinstance(router, Router) and "hidden" not in router.needs and place.name not in call.routings:
                self._decide(call, place, None)
        return call

    def _read_inputs(self, inputs: Mapping[str, Any]) -> Call:
        ids, embeddings, pixels = (inputs.get(n) for n in ("input_ids", "inputs_embeds", "pixel_values"))
        tokens = ids if ids is not None else embeddings
        if tokens is None:
            return Call(len(pixels), task_ids=self._row_tasks(len(pixels))) if pixels is not None else Call(1)
        rows, length = tokens.shape[:2]
        held = self._held_for(inputs.get("past_key_values"))
        image_id = getattr(self.base.config, "image_token_id", getattr(self.base.config, "image_token_index", None))
        image = ids == image_id if ids is not None and image_id is not None else None
        call = Call(rows, image=image, task_ids=self._row_tasks(rows), continues=held is not None)
        if held is not None:
            call.routings.update(held)
            return call
        call.prompt = self._prompt(inputs, rows, length, tokens.device)
        if pixels is not None:
            call.images_match = images_match_rows(image, len(pixels))
        if any(place.before_language for place in self.places) and ids is not None:
            hidden = self.base.get_input_embeddings()(ids)
            text = call.prompt if image is None else call.prompt & ~image
            call.text_features = RoutingContext(hidden=hidden, prompt=text).pooled()
        return call

    def _row_tasks(self, rows: int) -> Tensor | None:
        """Spread the request's tasks over the rows of a pass: one for all, or repeated for beams."""
        ids = self._request.task_ids
        if ids is None or len(ids) == rows:
            return ids
        if len(ids) == 1 or rows % len(ids) == 0:
            return ids.repeat_interleave(rows // len(ids))
        raise ValueError(f"got {len(ids)} task names for {rows} rows; give one name, or one a row")

    def _prompt(self, inputs: Mapping[str, Any], rows: int, length: int, device: torch.device) -> Tensor:
        mask, labels = inputs.get("attention_mask"), inputs.get("labels")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask[:, -length:].bool()
        else:
            real = torch.ones(rows, length, dtype=torch.bool, device=device)
        if self._request.prompt_length is not None:  # without a cache, what was generated comes back as input
            real = real & (torch.arange(length, device=device) < self._request.prompt_length)
        given = self._request.prompt_mask
        prompt = prompt_tokens(real, labels) if given is None else given.bool().to(device) & real
        if labels is not None and self._reads_prompt():
            _refuse_leaks(prompt, labels)
        return prompt

    def _reads_prompt(self) -> bool:
        spec = self.spec.router
        return spec is not None and spec.depends_on == "input" and spec.scope == "sequence"

    def _held_for(self, cache: Any) -> dict[str, Routing] | None:
        if cache is None or int(cache.get_seq_length()) == 0:
            return None
        if cache not in self._held:
            raise ValueError(
                "past_key_values holds tokens that this mixture did not process, so their routing is unknown; start "
                "from an empty cache or pass one that this mixture returned"
            )
        return self._held[cache]

    def _close_call(self, base: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call, self.context.call = self.context.call, None
        cache = getattr(output, "past_key_values", None)
        if call is not None and cache is not None and self.spec.router is not None:
            scope_is_sequence = self.spec.router.scope == "sequence"
            self._held[cache] = {k: r.detached() for k, r in call.routings.items()} if scope_is_sequence else {}
        elif cache is not None:
            self._held[cache] = {}

    def _block_hook(self, block: str) -> Any:
        places = [place for place in self.places if place.hook == block]
        early = [p for p in self.places if p.before_language and self.anatomy.tower("language").blocks[0] == block]

        def decide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = self.context.call
            if call is None or call.recomputing:
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            for place in places:
                self._decide(call, place, _embeddings(call, hidden) if place.before_language else hidden)
            for place in early:
                if place.name not in call.routings:  # no image in this call
                    self._decide(call, place, _no_patches(call, place.dim))

        return decide

    def _decide(self, call: Call, place: Place, hidden: Tensor | None) -> Routing:
        """Evaluate the router of a place, unless the cache that this call continues holds its routing."""
        if call.continues and place.name in call.routings:
            return call.routings[place.name]
        router = self.routers[self._index_of[place.name]]
        assert isinstance(router, Router)
        if self._override is None and "task_ids" in router.needs and call.task_ids is None:
            raise ValueError(
                f"{type(self.spec.router).__name__} needs the task of every row; pass task=, one of "
                f"{', '.join(self.tasks)}, or one a row"
            )
        over_tokens = hidden is not None and call.prompt is not None and hidden.shape[:2] == call.prompt.shape
        prompt, image = (call.prompt, call.image) if over_tokens else (None, None)
        routing: Routing = self._override or router(
            RoutingContext(hidden, prompt, image, call.task_ids, self._available)
        )
        call.routings[place.name] = routing
        if not call.recomputing:
            for trace in self._traces:
                trace.add(place.name, routing)
        return routing

    def _route(self, call: Call, site: Site, x: Tensor) -> Routing | None:
        """Give an adapted module its routing."""
        place = self._place_of.get(site.path)
        if place is None:
            return None
        if place.hook is None and place.dim:
            routing = self._decide(call, place, x)
        elif place.name in call.routings:
            routing = call.routings[place.name]
        else:
            raise RuntimeError(f"{site.path} was reached before the router at {place.name} could decide")
        _check_reach(call, site, place, routing, x)
        return routing


def attach(
    base: PreTrainedModel,
    *,
    shared: FamilySpec | None = None,
    experts: Mapping[str, FamilySpec] | None = None,
    router: RouterSpec | None = None,
    placement: Placement | None = None,
) -> Mixture:
    """Put adapters and routers on a base.

    Args:
        base: Any transformers model; it is frozen.
        shared: The adapter that every input uses.
        experts: Adapters that the router weighs, by name.
        router: Gives the experts their weights; needed exactly when there are experts.
        placement: Where adapters sit that name no placement of their own; by default all attention and MLP linears of
            the language tower.

    Raises:
        ValueError: A name is unsafe, nothing is to be attached, the router is missing or too many, or the base
            carries a mixture already.
    """
    experts = dict(experts or {})
    check_names(experts)
    if shared is None and not experts:
        raise ValueError("attach got neither shared nor experts; give at least one adapter")
    if bool(experts) != (router is not None):
        raise ValueError(
            f"attach got {len(experts)} experts and {'a' if router else 'no'} router; experts need a router, such as "
            "moadapt_routers.ByTask(), and a router needs experts"
        )
    taken = next((path for path, m in base.named_modules() if isinstance(m, AdaptedModule)), None)
    if taken is not None:
        raise ValueError(f"the base carries a mixture already (at {taken}); detach that one first")
    return Mixture(base, MixtureSpec(experts, shared, router, placement or Placement()))


def load(folder: str | Path, base: PreTrainedModel) -> Mixture:
    """Read a saved mixture onto its base.

    Args:
        folder: What `Mixture.save` wrote.
        base: The same base; its structure and weights are compared with the stored fingerprint.

    Raises:
        ValueError: The folder is no mixture, its schema is unknown, or the base is another one.
    """
    from moadapt.storage import load as load_folder

    return load_folder(Path(folder), base)


def _adapters(spec: MixtureSpec) -> tuple[Adapter, ...]:
    shared = [] if spec.shared is None else [Adapter(SHARED, spec.shared, None)]
    return (*shared, *(Adapter(name, s, i) for i, (name, s) in enumerate(spec.experts.items())))


def _sites(found: Anatomy, adapters: Sequence[Adapter], default: Placement) -> dict[Site, list[Adapter]]:
    """Return the sites in model order, each with the adapters that sit there."""
    chosen = {adapter.name: set(found.place(adapter.spec.placement or default)) for adapter in adapters}
    sites = {site: [adapter for adapter in adapters if site in chosen[adapter.name]] for site in found.sites}
    return {site: here for site, here in sites.items() if here}


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _embeddings(call: Call, patches: Tensor) -> Tensor:
    """Join each row's text features with its pooled patch embeddings, (B, 1, D)."""
    text, images = call.text_features, RoutingContext(hidden=patches).pooled()
    if text is None or not call.images_match:
        raise ValueError(
            "a router over the whole model with sites before the language tower needs input_ids and one image a row; "
            'place adapters in the language tower only, or use per="layer"'
        )
    return torch.cat([text, images], dim=-1).unsqueeze(1)


def _no_patches(call: Call, width: int) -> Tensor:
    """Stand-in of `_embeddings` for a call without images."""
    assert call.text_features is not None
    missing = call.text_features.new_zeros(call.num_rows, width - call.text_features.shape[-1])
    return torch.cat([call.text_features, missing], dim=-1).unsqueeze(1)


def _refuse_leaks(prompt: Tensor, labels: Tensor) -> None:
    if bool((prompt & (labels != -100)).any()):
        raise ValueError(
            "labels lie on prompt tokens, which a router by sequence reads: it would see the answer; set labels to "
            "-100 on the prompt or pass a smaller prompt_mask"
        )
    empty = (~prompt.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"rows {empty} have no prompt token before their first label, so a router by sequence has nothing to read; "
            'pass prompt_mask or use scope="token"'
        )


def _check_reach(call: Call, site: Site, place: Place, routing: Routing, x: Tensor) -> None:
    """Refuse a routing whose rows or tokens are not those of the site's input."""
    rows, tokens = routing.weights.shape[:2]
    if rows == 1 and tokens == 1:
        return
    if site.tower != "language" and rows > 1 and call.image is not None and not call.images_match:
        raise ValueError(
            f"{site.path} is routed by row, but images and rows do not match one to one in this call; give every row "
            "one image, or place experts in the language tower only"
        )
    if x.ndim != 3 or rows not in (1, len(x)) or tokens not in (1, x.shape[1]):
        raise ValueError(
            f"{site.path} gets input of shape {tuple(x.shape)}, but the routing at {place.name} has {rows} rows and "
            f"{tokens} tokens; use constant weights there or place experts elsewhere"
        )
