"""The mixture: one frozen base, the banks at its sites and the routers at their places.

Wrappers stand in the place of the base's modules and hooks on the blocks that routers read; `detach` takes all of it
away and returns the very same base.
"""

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from moadapt.acting import TokenRange, check_ranges, ranges_at
from moadapt.adapted import AdaptedModule
from moadapt.adapters.bank import Adapter, Bank
from moadapt.adapters.delta import NotMergeable
from moadapt.adapters.family import FamilySpec
from moadapt.call import Request
from moadapt.checkpointing import enable_checkpointing, swap_checkpointing
from moadapt.context import CallContext, block_input, encoder_states, routers_of
from moadapt.image_rows import ImageRows, find_image_rows, image_tokens_of
from moadapt.inserting import count_inserted, insert, plain_token
from moadapt.insertion import Inserted
from moadapt.mixture_spec import MixtureSpec
from moadapt.names import SHARED
from moadapt.places import plan_places
from moadapt.routing import Routing
from moadapt.shared_copies import Copied, SharedCopies
from moadapt.sites import Site, anatomy
from moadapt.task_names import TaskNames, indices, task_ids
from moadapt.towers import writer_within
from moadapt.tracing import Observation, SiteObservation, Trace

if TYPE_CHECKING:
    from moadapt.merging.method import MergeMethod
    from moadapt.merging.report import MergeReport


class Mixture(nn.Module):
    """A frozen base with adapters and routers; made by `attach` or `load`.

    Args:
        base: Any transformers model; it is frozen and wrapped in place until `detach`.
        spec: What to attach.
    """

    def __init__(self, base: PreTrainedModel, spec: MixtureSpec) -> None:
        super().__init__()
        self.base, self.spec = base, spec
        self.anatomy = anatomy(base)
        for adapter in spec.adapters():
            adapter.spec.check_base(base, self.anatomy)
        self.sites = spec.sites(self.anatomy)
        for adapter in spec.adapters():
            own = [site for site, here in self.sites.items() if adapter in here]
            check_ranges(adapter.name, adapter.spec.ranges, own, base, self.anatomy)
        routed = [site for site, here in self.sites.items() if any(a.expert is not None for a in here)]
        router = spec.router
        self.places = () if router is None else plan_places(base, self.anatomy, routed, router)
        self.routers = nn.ModuleList(router.build(p.dim, len(self.experts)) for p in self.places if router is not None)
        self.routers.to(base.device)
        self.context = CallContext(
            self.places,
            routers_of(self.routers),
            router,
            self.tasks,
            image_tokens_of(base),
            self._embed,
            self._find_images,
            routes_images=_reads_images(base, routed),
            encodes=base.config.is_encoder_decoder,
            reads_prompt=any(adapter.spec.reads_prompt for adapter in spec.adapters()),
            tells_images=any(set(adapter.spec.ranges) - {"answer"} for adapter in spec.adapters())
            or (router is not None and router.tells_images),
        )
        self.inserts = count_inserted(spec.adapters())
        """How many tokens adapters put before each row."""
        self.placeholder = plain_token(base) if self.inserts else 0
        self.required_grad = {name: p.requires_grad for name, p in base.named_parameters()}
        """Which parameters of the base were trainable before it was frozen, by name."""
        self._modes = {module: module.training for module in base.modules()}
        self._checkpointing: dict[nn.Module, dict[str, Any]] = {}
        self._wrappers = self._wrap()
        if router is not None and router.combines == "parameters":
            for site, bank in self.banks():
                if bank.has_experts:
                    bank.check_blending(site, len(self.experts), router.num_heads)
        self._handles: list[RemovableHandle] = []
        base.requires_grad_(False)
        self._install()
        self.train(base.training)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, in the order of a routing's weights."""
        return tuple(self.spec.experts)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names a row's task may have: those of the experts, unless the router has names of its own."""
        return () if self.spec.router is None else self.spec.router.task_names(self.experts)

    @property
    def attached(self) -> bool:
        """Whether it was not detached from its base."""
        return bool(self._handles)

    @property
    def checkpoints(self) -> bool:
        """Whether blocks are recomputed in the backward pass."""
        return bool(self._checkpointing)

    def banks(self) -> Iterator[tuple[Site, Bank]]:
        """Iterate over every bank with its site."""
        for site in self.sites:
            for bank in self._wrappers[site.path].banks:
                assert isinstance(bank, Bank), "wrappers hold banks"
                yield site, bank

    def forward(self, *, task: TaskNames = None, prompt_mask: Tensor | None = None, **inputs: Any) -> Any:
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
            ValueError: A task is unknown, labels lie on prompt tokens that the routing reads, or the mixture was
                detached.
        """
        self._refuse_detached()
        if self.checkpoints and self.training and hasattr(self.base.config.get_text_config(), "use_cache"):
            inputs = {"use_cache": False, **inputs}
        given = self._insert(inputs, Request(self.task_ids(task), prompt_mask))
        with self.context.requesting(given.request):
            return given.cut(self.base(**given.inputs))

    def generate(self, *, task: TaskNames = None, **inputs: Any) -> Any:
        """Generate with the base's own `generate`; sequence routings are decided on the prompt and then held.

        Args:
            task: As in `forward`.
            inputs: What the base's `generate` takes.
        """
        self._refuse_detached()
        given = self._insert(inputs, Request(self.task_ids(task)), getattr(self.base, "generation_config", None))
        inputs = given.inputs
        tokens = next((inputs[n] for n in ("input_ids", "inputs", "inputs_embeds") if inputs.get(n) is not None), None)
        shape = None if tokens is None else (tokens.shape[0], tokens.shape[1])
        if all(inputs.get(name) is None for name in ("input_ids", "inputs", "inputs_embeds", "pixel_values")):
            shape = (1, 1)  # `generate` starts from a single first token
        encodes = self.base.config.is_encoder_decoder or any(site.tower != "language" for site in self.sites)
        encodes = encodes or self._writer is not None
        with self.context.requesting(replace(given.request, prompt_shape=shape)):
            if self.context.enabled and encodes:
                named = inputs if inputs.get("inputs") is None else {**inputs, "input_ids": tokens}
                self.context.prepare(named)
            return given.cut_generated(self.base.generate(**inputs))  # type: ignore[operator]

    def task_ids(self, task: TaskNames) -> Tensor | None:
        """Turn task names into indices.

        Raises:
            ValueError: A name is unknown, and the known ones are listed; or indices are no row of integers in range.
        """
        router = self.spec.router
        if task is None or router is None:
            return None
        return task_ids(task, self.tasks, unknown=router.takes_unknown_tasks).to(self.base.device)

    def expert_ids(self, task: TaskNames, rows: int) -> Tensor:
        """Return the index of the expert that bears the name of each row's task, -1 where none does, (B,).

        Args:
            task: As in `forward`.
            rows: B.

        Raises:
            ValueError: A task is unknown, or there are tasks for another number of rows.
        """
        ids = self.task_ids(task)
        if ids is None:
            return torch.full((rows,), -1, device=self.base.device)
        if len(ids) not in (1, rows):
            raise ValueError(f"got {len(ids)} tasks for {rows} rows; give one name, or one a row")
        owners = [self.experts.index(name) if name in self.experts else -1 for name in self.tasks]
        return torch.tensor([*owners, -1], device=ids.device)[ids.expand(rows)]  # an unknown task, -1, has none

    @contextmanager
    def override(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Give every input these weights instead of the routers' within the `with` block.

        Args:
            weights: Weight by expert name; the others get 0.

        Raises:
            ValueError: A name is unknown.
        """
        indices("expert", weights, self.experts)
        before = self.context.override
        values = [float(weights.get(name, 0.0)) for name in self.experts]
        self.context.override = Routing.constant(torch.tensor(values, device=self.base.device))
        try:
            yield
        finally:
            self.context.override = before

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Keep dropout and noise off within the `with` block."""
        before = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(before)

    def copy_shared(self, count: int) -> SharedCopies:
        """Return copies of the shared adapter, whose gradients are those of one part of the rows each.

        Args:
            count: How many.

        Raises:
            ValueError: There is no shared adapter that is trained, or its family or the router allow no copies.
        """
        blends = self.spec.router is not None and self.spec.router.combines == "parameters"
        reads = _reads_images(self.base, [site for site, bank in self.banks() if SHARED in bank.names])
        return SharedCopies(self.banks(), len(self.experts), count, blends=blends, reads_images=reads)

    @contextmanager
    def using(self, copied: Copied | None) -> Iterator[None]:
        """Let rows use copies of the shared adapter within the `with` block.

        Args:
            copied: Which copy each row uses; None lets all use the adapter itself.
        """
        before, self.context.copies = self.context.copies, copied
        try:
            yield
        finally:
            self.context.copies = before

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

        Raises:
            ValueError: A name is unknown, or there is none.
        """
        chosen, before = indices("expert", experts, self.experts), self.context.available
        if not chosen:
            raise ValueError(f"only() needs at least one expert; choose from {', '.join(self.experts)}")
        self.context.available = torch.zeros(len(self.experts), dtype=torch.bool, device=self.base.device)
        self.context.available[chosen] = True
        try:
            yield
        finally:
            self.context.available = before

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the adapters that no optimiser reaches at any of their sites."""
        banks = [bank for _, bank in self.banks()]
        free = {name for bank in banks for name in bank.names if name not in bank.frozen}
        held = {name for bank in banks for name in bank.names}
        return tuple(a.name for a in self.spec.adapters() if a.name in held - free)

    def freeze(self, name: str) -> None:
        """Move an adapter to the frozen stacks, where no optimiser reaches it. Only between fits.

        Args:
            name: Of an expert, or `shared`.

        Raises:
            ValueError: There is no such adapter.
        """
        known = [adapter.name for adapter in self.spec.adapters()]
        if name not in known:
            raise ValueError(f"there is no adapter {name!r} to freeze; this mixture has {', '.join(known)}")
        for _, bank in self.banks():
            if name in bank.names:
                bank.freeze(name)

    @contextmanager
    def observe(self) -> Iterator[list[Observation]]:
        """Collect every routing that is decided within the `with` block, with its graph, for objectives and measures.

        Those of a checkpointed block's second run are left out.
        """
        found: list[Observation] = []
        with self.watch(found.append):
            yield found

    @contextmanager
    def watch(self, tell: Callable[[Observation], None]) -> Iterator[None]:
        """Tell of every routing when it is decided within the `with` block, so that none of them need be kept.

        Args:
            tell: Takes what `observe` would collect.
        """
        self.context.observers.append(tell)
        try:
            yield
        finally:
            self.context.observers.remove(tell)

    @contextmanager
    def watch_sites(self, tell: Callable[[SiteObservation], None]) -> Iterator[None]:
        """Tell of what enters every site, and of the routing there, within the `with` block.

        Args:
            tell: Takes one site's; sites of one block that read the same tensor are given that very tensor.
        """
        self.context.site_observers.append(tell)
        try:
            yield
        finally:
            self.context.site_observers.remove(tell)

    @contextmanager
    def trace(self) -> Iterator[Trace]:
        """Record every routing that is decided within the `with` block, per place, on the CPU."""
        trace = Trace(self.experts)
        self.context.traces.append(trace)
        try:
            yield trace
        finally:
            self.context.traces.remove(trace)

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

        Training then keeps no cache unless asked to, as a block run twice would fill it twice.
        """
        own = enable_checkpointing(self.base, self.context.checkpoint_contexts)
        self._checkpointing = self._checkpointing or own
        self.train(self.training)

    def save(self, folder: str | Path) -> None:
        """Write spec, adapters and routers, not the base.

        Args:
            folder: Made, or replaced as a whole where it holds a mixture.

        Raises:
            ValueError: The mixture was detached, or the folder holds something else.
        """
        from moadapt.storage import save

        self._refuse_detached()
        save(self, Path(folder))

    def merge(self, method: "str | MergeMethod", **options: Any) -> "tuple[PreTrainedModel, MergeReport]":
        """Fold the mixture into a plain model; the mixture stays usable.

        Args:
            method: Short name of a merge method, or the method.
            options: Of any merge: `task` or `tasks`, by name, that it serves (by default all); `calibration`, batches
                of what the mixture takes; `max_error`, a bound on the relative error of every site; `rank`, to which
                every change is cut; `dtype`, the number type of the plain model's weights, by default the base's, of
                a quantised one that of its activations. And what the method takes.

        Returns:
            A new transformers model without adapters, and how far it is from the mixture.

        Raises:
            MergeRefusedError: A site's error passes the bound.
            NotMergeable: Adapters act on some tokens only, or are no affine map.
            ValueError: The mixture was detached, or the method cannot merge it.
        """
        from moadapt.merging.plan import plan_merge

        self._refuse_detached()
        self.refuse_scoped()
        with self.evaluating():
            plan = plan_merge(self, method, **options)
            return plan.model(), plan.report()

    def export_peft(self, folder: str | Path, *, method: "str | MergeMethod" = "task", **options: Any) -> "MergeReport":
        """Write the merged adapters as a plain PEFT LoRA folder.

        Args:
            folder: Made, or replaced as a whole where it holds a PEFT LoRA.
            method: Short name of a merge method, or the method.
            options: As in `merge`; a change without low-rank form, such as that of `ties`, needs `rank`.

        Raises:
            MergeRefusedError: As in `merge`; nothing is written.
            NotMergeable: As in `merge`.
            ValueError: The mixture was detached, the method cannot merge it, or the folder holds something else.
        """
        from moadapt.hub.peft_folder import write_peft_folder
        from moadapt.merging.plan import plan_merge

        self._refuse_detached()
        self.refuse_scoped()
        with self.evaluating():
            plan = plan_merge(self, method, **options)
            plan.require()
            report: MergeReport = plan.report()
        with self.bare_base() as base:
            write_peft_folder(Path(folder), base, plan.deltas)
        return report

    def detach(self) -> PreTrainedModel:
        """Take everything off the base and return it, as it was before `attach`."""
        if self._handles:
            self._uninstall()
            for name, parameter in self.base.named_parameters():
                parameter.requires_grad_(self.required_grad[name])
            for module, mode in self._modes.items():
                module.training = mode
        return self.base

    @contextmanager
    def bare_base(self) -> Iterator[PreTrainedModel]:
        """Give the base without wrappers and hooks within the `with` block, to copy or inspect it."""
        attached = bool(self._handles)
        if attached:
            self._uninstall()
        try:
            yield self.base
        finally:
            if attached:
                self._install()

    def named_adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over all parameters that are not the base's, by name."""
        own = {id(p) for _, bank in self.banks() for p in bank.parameters()}
        own |= {id(p) for p in self.routers.parameters()}
        return ((name, p) for name, p in self.named_parameters() if id(p) in own)

    def _wrap(self) -> dict[str, AdaptedModule]:
        """Build the banks, and a wrapper for the module of each site; modules within others come first."""
        modules = {site: self.base.get_submodule(site.path) for site in self.sites}
        banks = build_banks(self.sites, modules)
        alone = len(self.anatomy.towers) == 1  # else an input outside of blocks may be the patches of all images
        pools = {s for s in self.sites if alone and s.layer is None and s.form == "linear"}
        wrappers = {s.path: AdaptedModule(modules[s], banks[s], s, self.context, s in pools) for s in self.sites}
        return dict(sorted(wrappers.items(), key=lambda item: -item[0].count(".")))

    def _install(self) -> None:
        self._swap_checkpointing()
        for path, wrapper in self._wrappers.items():
            _replace(self.base, path, wrapper)
        self._handles = [
            self.base.register_forward_pre_hook(self._open_call, with_kwargs=True),
            self.base.register_forward_hook(self._close_call, always_call=True),
        ]
        if self._writer is not None:
            self._handles += [
                self._writer.register_forward_pre_hook(self._open_within, with_kwargs=True),
                self._writer.register_forward_hook(self._close_within, always_call=True),
            ]
        vision = next((tower.path for tower in self.anatomy.towers if tower.name == "vision"), "")
        if vision:
            self._handles.append(self.base.get_submodule(vision).register_forward_pre_hook(self._enter_vision))
        for block in dict.fromkeys(block for place in self.places for block in (place.hook, place.fallback) if block):
            reads = any(place.reads_encoder and place.hook == block for place in self.places)
            hook = partial(self._enter_block, block, reads)  # no closure, which a copy would share with the original
            self._handles.append(self.base.get_submodule(block).register_forward_pre_hook(hook, with_kwargs=True))

    def _uninstall(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for path, wrapper in reversed(self._wrappers.items()):
            _replace(self.base, path, wrapper.module)
        self._swap_checkpointing()

    @property
    def _writer(self) -> PreTrainedModel | None:
        return writer_within(self.base)

    def _swap_checkpointing(self) -> None:
        """Exchange the base's own settings of gradient checkpointing with the mixture's, where it has any."""
        swap_checkpointing(self._checkpointing)

    def _refuse_detached(self) -> None:
        if not self.attached:
            raise ValueError("this mixture was detached from its base; attach adapters again, or load them")

    def refuse_scoped(self) -> None:
        """Refuse to merge what acts on some tokens only.

        Raises:
            NotMergeable: An adapter does.
        """
        for site, bank in self.banks():
            if bank.acts_on:
                raise NotMergeable(
                    f"{site.path}: {', '.join(bank.names)} acts on {' and '.join(bank.acts_on)} alone, but a weight "
                    "changes every token; keep the mixture, or leave acts_on out"
                )

    def _open_call(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.context.enabled:
            named = inspect.signature(base.forward).bind_partial(*args).arguments if args else {}
            self.context.start({**kwargs, **named})

    def _close_call(self, base: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.context.close(output)

    def _open_within(self, writer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.context.enabled:
            self.context.start_within(kwargs)

    def _close_within(self, writer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.context.close_within(output)

    def _enter_vision(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.context.enter_vision()

    def _find_images(self, inputs: Mapping[str, Any], num_rows: int) -> tuple[ImageRows, ...]:
        return find_image_rows(self.base, inputs, num_rows)

    def _enter_block(
        self, block: str, reads_encoder: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        encoded = encoder_states(module, args, kwargs) if reads_encoder else None
        self.context.enter_block(block, block_input(args, kwargs), encoded)

    def _insert(
        self, inputs: Mapping[str, Any], request: Request, generates: GenerationConfig | None = None
    ) -> Inserted:
        count = self.inserts if self.context.enabled else 0
        return insert(inputs, request, count, self.placeholder, generates=generates)

    def _embed(self, ids: Tensor) -> Tensor:
        module = self.base.get_input_embeddings()
        embeddings: Tensor = (module.module if isinstance(module, AdaptedModule) else module)(ids)
        return embeddings


def build_banks(sites: Mapping[Site, Sequence[Adapter]], modules: Mapping[Site, nn.Module]) -> dict[Site, list[Bank]]:
    """Build the banks of sites, one for all adapters of a family that share one.

    Args:
        sites: The adapters of each.
        modules: The frozen module of each, on whose device its banks are.
    """
    banks: dict[Site, list[Bank]] = {site: [] for site in sites}
    for family, ranges, shared in dict.fromkeys(_stack_of(a) for here in sites.values() for a in here):
        together = {
            site: ([a for a in here if _stack_of(a) == (family, ranges, shared)], modules[site])
            for site, here in sites.items()
        }
        for site, bank in family.banks({site: given for site, given in together.items() if given[0]}).items():
            bank.family, bank.acts_on = family, ranges_at(site, ranges)
            banks[site].append(bank.to(next(modules[site].parameters()).device))
    return banks


def _reads_images(base: PreTrainedModel, sites: Sequence[Site]) -> bool:
    """Tell whether some site gets images by themselves, before the language tower or where text attends to them."""
    crosses = getattr(base.config.get_text_config(), "cross_attention_layers", None)
    return bool(crosses) or any(site.tower != "language" for site in sites)


def _stack_of(adapter: Adapter) -> tuple[type[FamilySpec], tuple[TokenRange, ...], Hashable]:
    """Adapters of which this is the same share a bank."""
    return type(adapter.spec), adapter.spec.ranges, adapter.spec.shares_with()


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
