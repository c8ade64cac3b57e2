"""The call context: routing state of one mixture, set for one forward pass and gone when it ends.

The mixture opens a call when its base starts a forward pass and closes it when the pass ends, however it ends; hooks on
blocks let the routers of their places decide; adapted modules ask for the routing of their site. Gradient checkpointing
recomputes a block after the call is closed, so each checkpoint remembers its call and restores it.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moadapt.call import Call, Request, check_filled, check_prompt, read_call
from moadapt.image_rows import ImageRows
from moadapt.places import Place
from moadapt.reaching import reach
from moadapt.router import STATES, Router, RouterSpec, RoutingContext
from moadapt.routing import Routing
from moadapt.seeing import see
from moadapt.sites import Site
from moadapt.tracing import Observation, SiteObservation, Trace

if TYPE_CHECKING:
    from moadapt.shared_copies import Copied


@dataclass(frozen=True)
class Held:
    """What a call leaves for those that continue its cache.

    Args:
        routings: Those by sequence, by place.
        memories: What banks keep of the prompt, by module path.
        with_image: Which rows have an image in their prompt, (B,).
    """

    routings: dict[str, Routing]
    memories: dict[str, dict[str, Tensor]]
    with_image: Tensor | None


class CallContext:
    """Holds the current call of one mixture and lets its routers decide.

    Args:
        places: Where the routers sit.
        routers: One a place.
        spec: What the user chose; None without experts.
        tasks: Names of experts and tasks.
        image_tokens: Token ids that stand for patches of images and videos.
        embed: Gives the embeddings of input tokens.
        find_images: Tells which row each image of a call belongs to, from its inputs and its number of rows, for every
            run of the vision tower.
        routes_images: Whether some site before the language tower is routed.
        encodes: Whether the base has an encoder that reads the prompt, and a decoder of its own.
        reads_prompt: Whether some adapter lets tokens read later tokens of the prompt.
        tells_images: Whether adapters or routers must tell image tokens from text.
    """

    def __init__(
        self,
        places: Sequence[Place],
        routers: Sequence[Router],
        spec: RouterSpec | None,
        tasks: tuple[str, ...],
        image_tokens: Sequence[int],
        embed: Callable[[Tensor], Tensor],
        find_images: Callable[[Mapping[str, Any], int], tuple[ImageRows, ...]],
        *,
        routes_images: bool = False,
        encodes: bool = False,
        reads_prompt: bool = False,
        tells_images: bool = False,
    ) -> None:
        self.call: Call | None = None
        self.enabled = True
        self.override: Routing | None = None
        self.available: Tensor | None = None
        self.progress: Tensor | None = None
        self.noise: Mapping[str, torch.Generator] | None = None
        self.copies: Copied | None = None
        self.traces: list[Trace] = []
        self.observers: list[Callable[[Observation], None]] = []
        self.site_observers: list[Callable[[SiteObservation], None]] = []
        self._routers = {place.name: (place, router) for place, router in zip(places, routers, strict=True)}
        self._place_of = {path: place for place in places for path in place.sites}
        self._spec, self._tasks, self._image_tokens, self._embed = spec, tasks, image_tokens, embed
        self._find_images, self._routes_images, self._encodes = find_images, routes_images, encodes
        self._by_sequence = spec is not None and spec.scope == "sequence"
        self._reads_prompt, self._tells_images = reads_prompt, tells_images
        self._request: Request | None = None
        self._prepared: Call | None = None
        self._prompt: Tensor | None = None
        self._within: Call | None = None
        self._held: WeakKeyDictionary[Any, Held] = WeakKeyDictionary()

    @contextmanager
    def requesting(self, request: Request) -> Iterator[None]:
        """Let all passes within the `with` block serve one request of the caller."""
        before, self._request = self._request, request
        try:
            yield
        finally:
            self._request = before
            self._prepared = self._prompt = self._within = self.call = None

    @contextmanager
    def standing_in(self, routers: Mapping[str, Router]) -> Iterator[None]:
        """Let other routers decide within the `with` block.

        Args:
            routers: By the name of the place.
        """
        before = self._routers
        self._routers = {name: (place, routers.get(name, own)) for name, (place, own) in before.items()}
        try:
            yield
        finally:
            self._routers = before

    def prepare(self, inputs: Mapping[str, Any]) -> None:
        """Open a call ahead of the base's first pass, for encoders that `generate` runs before it.

        Args:
            inputs: What `generate` was called with.
        """
        self._prepared, self._prompt = self._open(inputs), inputs.get("input_ids")

    def start(self, inputs: Mapping[str, Any]) -> Call:
        """Open the call of a forward pass.

        Args:
            inputs: What the base was called with.

        Raises:
            RuntimeError: The base was called without its mixture, so that nobody said where the prompt ends.
            ValueError: Labels lie on the prompt, tasks do not fit the rows, or the cache is foreign.
        """
        call = self._open(inputs)
        for trace in self.traces:
            trace.start(call.task_ids)
        return call

    def _open(self, inputs: Mapping[str, Any]) -> Call:
        if self._request is None:
            raise RuntimeError("the base was called without its mixture; call the mixture, or detach() first")
        if self._encodes:  # labels are the decoder's
            inputs = {name: given for name, given in inputs.items() if name != "labels"}
        held = self._held_for(inputs.get("past_key_values"))
        call = self.call = read_call(inputs, self._request, self._image_tokens, continues=held is not None)
        call.available, call.progress, call.noise, call.copies = self.available, self.progress, self.noise, self.copies
        if self._encodes:
            self._tell_encoded(call, inputs)
        self._check_prompt(call, self._request, inputs.get("labels"))
        self._check_images(call)
        asked = self._routes_images or (self.copies is not None and self.copies.reads_images)
        if asked and call.real is not None:
            call.image_rows = self._find_images(inputs, call.num_rows)
        if held is not None:
            call.routings.update(held.routings)
            call.memories.update(held.memories)
            call.with_image = held.with_image
        if self._prepared is not None and held is None:
            times = call.num_rows // self._prepared.num_rows
            call.routings.update({p: r.repeat_rows(times) for p, r in self._prepared.routings.items()})
            call.image_rows = self._prepared.image_rows
        if self.override is not None:
            self._override(call, self.override)
        self._decide_early(call, inputs.get("input_ids"))
        return call

    def _tell_encoded(self, call: Call, inputs: Mapping[str, Any]) -> None:
        """Tell what the encoder reads, or has read before a decoder's pass, whose own tokens are of answers."""
        if inputs.get("encoder_outputs") is None:
            call.encoded = None if call.prompt is None else (call.prompt, call.image)
            return
        call.prompt = call.real = call.image = None
        mask, ahead = inputs.get("attention_mask"), self._prepared
        if ahead is not None and ahead.encoded is not None:
            prompt, image = ahead.encoded
            rows = torch.arange(len(prompt)).repeat_interleave(call.num_rows // len(prompt))  # beams
            call.encoded = prompt[rows], None if image is None else image[rows]
        elif mask is not None and not self._image_tokens:
            call.encoded = mask.bool(), None

    def close(self, output: Any) -> None:
        """End the call; routings by sequence are held with the cache that came out of it."""
        call, self.call = self.call, None
        cache = getattr(output, "past_key_values", None)
        if call is None or cache is None or (call.continues and call.overridden):
            return
        routings = {p: r.detached() for p, r in call.routings.items()} if self._by_sequence else {}
        memories = {path: {n: t.detach() for n, t in kept.items()} for path, kept in call.memories.items()}
        self._held[cache] = Held(routings, memories, call.with_image)

    def start_within(self, inputs: Mapping[str, Any]) -> None:
        """Open the call of a pass that a model within the base makes on its own, from embeddings of the prompt.

        Args:
            inputs: What that model was called with.
        """
        if self.call is not None and self.call is not self._prepared:
            return  # a pass of the base is under way
        rows = inputs.get("inputs_embeds")
        if rows is not None and self._prompt is not None:
            inputs = {**inputs, "input_ids": self._prompt.repeat_interleave(len(rows) // len(self._prompt), dim=0)}
        self._within = self.start(inputs)

    def close_within(self, output: Any) -> None:
        """End the call that `start_within` opened, if it did."""
        if self._within is not None:
            self._within = None
            self.close(output)

    def enter_vision(self) -> None:
        """Note that the vision tower runs; its second run in a call, on videos, is routed by itself."""
        call = self.call
        if call is None:
            return
        if call.run >= 0:
            before = {
                p.name for p, _ in self._routers.values() if p.tower != "language" and p.dim and not p.before_language
            }
            kept = {name: routing for name, routing in call.routings.items() if name not in before}
            self.call = call = replace(call, routings=kept, _found={})
        call.run += 1

    def enter_block(self, block: str, hidden: Tensor, encoded: Tensor | None = None) -> None:
        """Let the routers decide that read what enters a block.

        Args:
            block: Module path.
            hidden: Its input, (B, T, D).
            encoded: What a block of a decoder gets of the encoder, (B, T, D).

        Raises:
            ValueError: The block's input has another shape.
        """
        call = self.call
        if call is None or call.recomputing or call.overridden:
            return
        seen: dict[bool, RoutingContext] = {}
        for place, _ in self._routers.values():
            if place.hook == block or (place.fallback == block and place.name not in call.routings):
                if place.reads_encoder:
                    self._decide(call, place, self._see(call, place, encoded))
                    continue
                if place.summarises not in seen:
                    seen[place.summarises] = self._see(call, place, hidden, reached=place.hook == block)
                self._decide(call, place, seen[place.summarises])

    def judge(self, site: Site) -> Router | None:
        """Return the router of a site where it decides on what the module and each expert give there.

        Args:
            site: Where.
        """
        place = self._place_of.get(site.path)
        if place is None or self._spec is None or self._spec.reads != "outputs":
            return None
        return self._routers[place.name][1]

    def route(
        self, call: Call, site: Site, x: Tensor, output: Tensor | None = None, outputs: Tensor | None = None
    ) -> Routing | None:
        """Give an adapted module its routing.

        Args:
            call: The current call.
            site: Where.
            x: Input of the site, (B, T, D) or (N, D).
            output: What the module gives, (B, T, F), where the router judges it.
            outputs: What each expert would add, (B, T, E, F), likewise.

        Raises:
            ValueError: The routing's rows or tokens are not those of the site, or the site runs before its router.
        """
        place = self._place_of.get(site.path)
        if place is None:
            return None
        if place.hook is None and place.dim and not call.overridden:
            seen = replace(self._see(call, place, x), output=output, outputs=outputs)
            routing = self._decide(call, place, seen)
        elif place.name in call.routings:
            routing = call.routings[place.name]
        else:
            raise ValueError(
                f"{site.path} runs before the router at {place.name} decides, which reads what enters "
                f"{place.hook or place.fallback}; pass input_ids, not encoder_outputs, to an encoder-decoder; else use "
                'a router by task, constant weights or per="site", or leave experts out there'
            )
        return reach(call, site, place.name, routing, x, by_sequence=self._by_sequence)

    def tell(self, site: Site, x: Tensor, routing: Routing | None) -> None:
        """Tell whoever watches sites of what enters one, and of the routing there.

        Args:
            site: Where.
            x: Input of the site, (B, T, D) or (N, D).
            routing: As the site heeds it; None where nothing is routed.
        """
        for tell in self.site_observers:
            tell(SiteObservation(site, x, routing))

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a checkpointed block's first run and of its recomputation."""
        call = self.call
        return nullcontext(), nullcontext() if call is None else self._restored(call)

    @contextmanager
    def _restored(self, call: Call) -> Iterator[None]:
        before, self.call = self.call, replace(call, routings=dict(call.routings), recomputing=True)
        try:
            yield
        finally:
            self.call = before

    def _check_images(self, call: Call) -> None:
        if self._tells_images and call.real is not None and call.image is None and self._image_tokens:
            raise ValueError(
                "some adapter or router tells text and image tokens apart, and inputs_embeds does not; pass input_ids"
            )

    def _check_prompt(self, call: Call, request: Request, labels: Tensor | None) -> None:
        spec = self._spec
        routes = spec is not None and spec.depends_on == "input" and self._by_sequence and self.override is None
        if not (routes or self._reads_prompt) or call.prompt is None:
            return
        reader = "a router by sequence" if routes else "a cross-modal adapter"
        if call.image is None and self._image_tokens:
            raise ValueError(
                f"{reader} reads text and image tokens apart, and inputs_embeds does not tell them; pass input_ids"
            )
        if request.prompt_shape is not None and call.prompt.shape[1] < request.prompt_shape[1]:
            raise ValueError(
                f"generate() gave {call.prompt.shape[1]} of {request.prompt_shape[1]} prompt tokens at first, but "
                f"{reader} decides on the whole prompt; leave prefill_chunk_size unset"
            )
        check_prompt(call.prompt, labels, reader)
        if routes:
            check_filled(call.prompt)

    def _decide_early(self, call: Call, ids: Tensor | None) -> None:
        """Evaluate what needs no hidden states, and pool the text where a router over the model will need it."""
        if call.overridden:
            return
        for place, router in self._routers.values():
            if not router.needs & STATES and place.name not in call.routings:
                self._decide(call, place, self._see(call, place, None))
            elif place.before_language and ids is not None and call.prompt is not None and call.text_features is None:
                text = call.prompt if call.image is None else call.prompt & ~call.image
                call.text_features = RoutingContext(hidden=self._embed(ids), prompt=text).pooled

    def _override(self, call: Call, routing: Routing) -> None:
        """Give every place the routing of the user's choice, whatever a cache holds."""
        call.overridden = True
        for place, _ in self._routers.values():
            if call.routings.get(place.name) is not routing:  # as it is where `generate` prepared the call
                self._note(call, place, routing, self._see(call, place, None))

    def _decide(self, call: Call, place: Place, seen: RoutingContext) -> Routing:
        """Evaluate the router of a place, unless the cache that this call continues holds its routing."""
        if call.continues and place.name in call.routings:
            return call.routings[place.name]
        router = self._routers[place.name][1]
        if "task_ids" in router.needs and call.task_ids is None:
            raise ValueError(
                f"{type(self._spec).__name__} needs the task of every row; pass task=, one of "
                f"{', '.join(self._tasks)}, or one a row"
            )
        return self._note(call, place, router(seen), seen)

    def _note(self, call: Call, place: Place, routing: Routing, seen: RoutingContext) -> Routing:
        call.routings[place.name] = routing
        if not call.recomputing:
            for trace in self.traces:
                trace.add(place.name, routing)
            for tell in self.observers:
                tell(Observation(place.name, routing, seen, call.continues, self._by_sequence))
        return routing

    def _see(self, call: Call, place: Place, hidden: Tensor | None, *, reached: bool = True) -> RoutingContext:
        return see(call, place, hidden, by_sequence=self._by_sequence, reached=reached)

    def _held_for(self, cache: Any) -> Held | None:
        if cache is None or int(cache.get_seq_length()) == 0:
            return None
        if cache not in self._held:
            raise ValueError(
                "past_key_values holds tokens that this mixture did not process, so their routing is unknown; start "
                "from an empty cache or pass one that this mixture returned"
            )
        return self._held[cache]


def block_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states that a block was called with, (B, T, D)."""
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor), "transformers' blocks take their hidden states first"
    return hidden


def encoder_states(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return what a block of a decoder was given of the encoder, (B, T, D); None for other blocks."""
    found: Tensor | None = (
        inspect.signature(block.forward).bind_partial(*args, **kwargs).arguments.get("encoder_hidden_states")
    )
    return found


def routers_of(modules: nn.ModuleList) -> list[Router]:
    """Return a module list's routers with their type."""
    return [module for module in modules if isinstance(module, Router)]
