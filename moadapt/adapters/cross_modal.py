"""Cross-modal gated adapter: text and image tokens read each other through low-rank attention behind closed gates.

In a decoder that holds both in one sequence, each direction changes the tokens S of one stream by the tokens V of the
other: `S' = S + tanh(g) softmax(Q K^T / sqrt(m)) U Wo^T` with `Q = S Wq^T`, `K = V Wk^T`, `U = V Wv^T` of width m. The
form follows cross-attention behind a zero tanh gate (Alayrac et al., "Flamingo", section 2.2), at low rank and with a
gate of its own for each direction. Gates start at zero, so that a fresh adapter changes nothing; `Wo` starts small but
not at zero, so that gates get gradient. Images are read from the prompt only, and image tokens read the text of the
prompt only, so that no token sees a later one that is to be predicted. What text tokens read of the images is kept for
the passes that continue a cache. Axes: B rows, T tokens, D features, N tokens of a stream, A adapters, M widest of
their ranks, R stacked ranks, H heads of a routing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from moadapt.adapters.bank import Adapter
from moadapt.adapters.delta import Delta, NotMergeable
from moadapt.adapters.family import FamilySpec
from moadapt.adapters.stacked import StackedBank
from moadapt.adapters.streams import streams
from moadapt.adapters.weighing import weigh_up
from moadapt.call import Call
from moadapt.image_rows import image_tokens_of
from moadapt.placement import Placement
from moadapt.registry import FAMILIES
from moadapt.sites import Anatomy, Site

Direction = Literal["image_to_text", "text_to_image"]
DIRECTIONS: tuple[Direction, ...] = ("image_to_text", "text_to_image")
_MAPS = ("query", "key", "value", "up", "gate")


@FAMILIES.register("cross_modal")
@dataclass(frozen=True, kw_only=True)
class CrossModal(FamilySpec):
    """Gated low-rank attention between image and text tokens, in the language tower.

    Args:
        rank: Width m of queries, keys and values, 1 or more.
        directions: `image_to_text` lets every text token read the row's images, `text_to_image` lets image tokens read
            the text of the prompt; one or both.
        pooled: Read the mean of the other stream instead of attending to it, which is cheaper.

    Raises:
        ValueError: The rank is out of range, or a direction is unknown, missing or told twice.
    """

    rank: int = 8
    directions: tuple[Direction, ...] = DIRECTIONS
    pooled: bool = False

    forms: ClassVar = ("entry", "sublayer")
    routes: ClassVar = frozenset({"row", "token", "heads"})
    mergeable: ClassVar = False
    reads_prompt: ClassVar = True
    cross_modal: ClassVar = True

    def __post_init__(self) -> None:
        """Check rank and directions."""
        if self.rank < 1:
            raise ValueError(f"CrossModal got rank={self.rank}; need 1 or more")
        given = sorted(self.directions)
        if not given or any(given.count(name) > 1 or name not in DIRECTIONS for name in given):
            raise ValueError(f"CrossModal got directions={self.directions}; give one or both of {DIRECTIONS}")

    def default_kinds(self) -> tuple[str, ...]:
        """Return the entry and the MLPs."""
        return ("entry", "mlp")

    def check_base(self, base: PreTrainedModel, parts: Anatomy) -> None:
        """Refuse a base whose language tower holds no image tokens."""
        lacks = None
        if all(tower.name != "vision" for tower in parts.towers):
            lacks = "has no vision tower"
        elif base.config.is_encoder_decoder:
            lacks = "keeps images in an encoder, apart from the text that its decoder writes"
        elif not image_tokens_of(base):
            lacks = "has no token that stands for image patches"
        if lacks is not None:
            raise ValueError(
                f"CrossModal lets image and text tokens of one sequence read each other, but {type(base).__name__} "
                f"{lacks}, so there is nothing to cross; choose another family for this base"
            )

    def sites(self, found: Anatomy, default: Placement) -> tuple[Site, ...]:
        """Return the sites in the language tower, without those whose image tokens no text token reads any more."""
        chosen = super().sites(found, default)
        last = len(found.tower("language").blocks) - 1
        behind = [site for site in chosen if site.form == "sublayer" and site.layer == last]
        unread = behind if "text_to_image" in self.directions else []
        kept = tuple(site for site in chosen if site.tower == "language" and site not in unread)
        if not kept:
            raise ValueError(
                f"CrossModal would sit at {chosen[0].path}, in the {chosen[0].tower} tower; it needs the language "
                "tower, and there a block behind which text still reads the images, or image_to_text alone"
            )
        return kept

    @classmethod
    def bank(cls, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> "CrossModalBank":
        """Build the stack of one site."""
        return CrossModalBank(site, adapters, module)


class CrossModalBank(StackedBank):
    """All cross-modal adapters of one site, stacked along the rank axis; one that lacks a direction has no ranks there.

    Args:
        site: Where.
        adapters: Shared first, then experts.
        module: The frozen module there.
    """

    tensors = tuple(f"{direction}_{name}" for direction in DIRECTIONS for name in _MAPS)
    vectors = frozenset(f"{direction}_gate" for direction in DIRECTIONS)
    indexed = tuple(f"{direction}_up" for direction in DIRECTIONS)

    def fresh(self, spec: CrossModal) -> dict[str, Tensor]:
        """Return for each direction `query`, `key`, `value` (m, D), uniform, `up` (m, D), small, and `gate` (1,), 0."""
        width, device = self.site.in_features, self.owner(self.tensors[0]).device
        bound = 1 / math.sqrt(width)
        found: dict[str, Tensor] = {}
        for direction in DIRECTIONS:
            rank = spec.rank if direction in spec.directions else 0
            attending = 0 if spec.pooled else rank
            for name, rows in (("query", attending), ("key", attending), ("value", rank)):
                found[f"{direction}_{name}"] = torch.empty(rows, width, device=device).uniform_(-bound, bound)
            found[f"{direction}_up"] = torch.randn(rank, width, device=device) * 0.02
            found[f"{direction}_gate"] = torch.zeros(min(rank, 1), device=device)
        return found

    def change(self, x: Tensor, y: Tensor, weights: Tensor, call: Call | None) -> Tensor:
        """Return the delta of both directions, each token's own."""
        read, spread, up = [], [], []
        for direction in DIRECTIONS:
            if len(self.owner(f"{direction}_up")) and (found := self._read(direction, x, call)) is not None:
                gates = self.stack(f"{direction}_gate").tanh()[self.adapter_of(f"{direction}_up")]
                read.append(found * gates.to(found.dtype))
                spread.append(self.spread(weights, f"{direction}_up"))
                up.append(self.stack(f"{direction}_up"))
        if not read:
            return torch.zeros_like(y)
        mapped = weigh_up(
            torch.cat(read, -1).to(y.dtype), torch.cat(spread, -1), torch.cat(up).to(y.dtype), self.site.path
        )
        return mapped.to(y.dtype)

    def delta(self, weights: Tensor) -> Delta:
        """Refuse to merge.

        Raises:
            NotMergeable: Always.
        """
        raise NotMergeable(
            f"{self.site.path}: CrossModal adds what a token reads from other tokens, which no weight of a module can "
            "hold; keep the mixture, or leave its cross-modal adapters out"
        )

    def readings(self) -> dict[str, float]:
        """Return |tanh g| of every adapter and direction, as `gate/<adapter>/<direction>`."""
        gates = {
            f"gate/{name}/{direction}": self.live(name, f"{direction}_gate").detach()
            for name in self.names
            for direction in DIRECTIONS
        }
        return {name: float(gate.tanh().abs()) for name, gate in gates.items() if len(gate)}

    def _index(self) -> None:
        """Rebuild the maps between stacked ranks and those of each adapter."""
        super()._index()
        device = self.owner(self.tensors[0]).device
        for direction in DIRECTIONS:
            queries, values = (
                [self._sizes[adapter.name][f"{direction}_{name}"] for adapter in self._in_order()]
                for name in ("query", "value")
            )
            maps = {
                "queries": _places(queries),
                "values": _places(values),
                "back": (_places(values).flatten() < sum(values)).nonzero().flatten(),
                "widths": torch.tensor(queries, dtype=torch.long).clamp(min=1),
            }
            for name, each in maps.items():
                self.register_buffer(f"{direction}_{name}", each.to(device), persistent=False)

    def _read(self, direction: Direction, x: Tensor, call: Call | None) -> Tensor | None:
        """Return what every token reads from the other stream, (B, T, R); None where nothing is there to read."""
        assert call is not None, "a cross-modal bank runs within a call"
        maps = {name: self.stack(f"{direction}_{name}").to(x.dtype) for name in ("query", "key", "value")}
        if call.prompt is None:
            kept = call.memories.get(self.site.path, {})
            if direction == "text_to_image" or "image_keys" not in kept:
                return None
            return self._attend(direction, x @ maps["query"].T, kept["image_keys"], kept["image_values"], kept["image"])
        found = streams(call, x, self.site.path)
        asking, read = (found.text, found.image) if direction == "image_to_text" else (found.image, found.question)
        keys, values = read.of(x @ maps["key"].T), read.of(x @ maps["value"].T)
        if direction == "image_to_text" and not call.recomputing:
            kept = {"image_keys": keys, "image_values": values, "image": read.real}
            call.memories.setdefault(self.site.path, {}).update(kept)
        attended = self._attend(direction, asking.of(x @ maps["query"].T), keys, values, read.real)
        return asking.spread(attended, x.shape[1])

    def _attend(self, direction: Direction, queries: Tensor, keys: Tensor, values: Tensor, real: Tensor) -> Tensor:
        """Attend, each adapter by itself.

        Args:
            direction: Whose ranks these are.
            queries: (B, N, R'), R' being 0 where all adapters read the mean.
            keys: Of the other stream, (B, N', R').
            values: (B, N', R).
            real: Which tokens of the other stream are there, (B, N').

        Returns:
            (B, N, R), zero in rows where no token is.
        """
        if len(real) != len(queries):
            raise ValueError(
                f"{self.site.path}: the cache holds the images of {len(real)} rows, got {len(queries)} rows; continue "
                "it with the rows it was filled with"
            )
        some = real.any(dim=1)[:, None, None]
        seen = (real[:, None, None] | ~some.unsqueeze(-1)).expand(-1, 1, queries.shape[1], -1)
        q, k = (self._by_adapter(tensor, f"{direction}_queries") for tensor in (queries, keys))
        v = self._by_adapter(values, f"{direction}_values")
        q = q * self.get_buffer(f"{direction}_widths").to(q.dtype).rsqrt().reshape(-1, 1, 1)
        found = rearrange(functional.scaled_dot_product_attention(q, k, v, seen, scale=1.0), "b a n m -> b n (a m)")
        return found.index_select(-1, self.get_buffer(f"{direction}_back")) * some

    def _by_adapter(self, tensor: Tensor, name: str) -> Tensor:
        """Part the ranks of a tensor (B, N, R) among their adapters, (B, A, N, M), ranks that one lacks being zero."""
        places = self.get_buffer(name)
        parted = functional.pad(tensor, (0, 1)).index_select(-1, places.flatten())
        return rearrange(parted, "b n (a m) -> b a n m", a=len(places))


def _places(sizes: Sequence[int]) -> Tensor:
    """Say which stacked rank each adapter has in each of its places, (A, M), their number where it has none.

    Args:
        sizes: Ranks of each adapter.
    """
    starts, total = [sum(sizes[:i]) for i in range(len(sizes))], sum(sizes)
    found = torch.full((len(sizes), max([*sizes, 1])), total)
    for row, start, size in zip(found, starts, sizes, strict=True):
        row[:size] = torch.arange(start, start + size)
    return found
