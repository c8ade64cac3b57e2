"""Prefixes with zero gates: learned keys and values that every token may attend to, beside its own attention.

`out_h = attn_h + sum_e w_e tanh(g_eh) softmax(s q_h K_e^T) V_e`, with a softmax of its own for every adapter e and a
gate for every head h. Gates start at zero, so a fresh adapter changes nothing, and at the first step only they learn.
Zhang et al., "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention", section 3.2; keys and
values are learned themselves and not through the frozen projections, and bear no position, while queries of bases with
rotary positions bear theirs: rows padded on the left want `position_ids`, as `generate` gives them. Axes: B rows, T
tokens, H heads, K heads of keys and values, d numbers a head, R stacked rows of prefixes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedModel

from moadapt.adapters.attention_interface import Heads, adding, attention_in, heads_of
from moadapt.adapters.bank import Adapter
from moadapt.adapters.delta import Delta, NotMergeable
from moadapt.adapters.family import FamilySpec
from moadapt.adapters.stacked import StackedBank
from moadapt.adapters.weighing import all_weights
from moadapt.call import Call
from moadapt.image_rows import image_tokens_of
from moadapt.registry import FAMILIES
from moadapt.routing import Routing
from moadapt.sites import Anatomy, Site

KINDS = ("all", "text", "image")
"""Whom the rows of a prefix serve: all tokens, or text and image tokens apart."""


@FAMILIES.register("prefix")
@dataclass(frozen=True, kw_only=True)
class Prefix(FamilySpec):
    """Learned keys and values beside attention, behind gates that start shut.

    Args:
        length: Rows that tokens may attend to, n; each has 2 d numbers a head of keys and values, and each head a gate.
        image_length: Rows for image tokens alone, those of `length` then serving text alone; 0 leaves image tokens as
            they are. None lets `length` serve all tokens. In a vision tower every token is an image token.

    Raises:
        ValueError: A length is negative, or both are zero.
    """

    length: int = 10
    image_length: int | None = None

    forms: ClassVar[tuple[str, ...]] = ("sublayer",)
    routes: ClassVar[frozenset[str]] = frozenset({"row", "token"})
    mergeable: ClassVar[bool] = False
    standalone: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check ranges."""
        image = self.length if self.image_length is None else self.image_length
        if min(self.length, image) < 0 or max(self.length, image) == 0:
            raise ValueError(
                f"Prefix got length={self.length}, image_length={self.image_length}; give whole numbers from 0 on, one "
                "of them above 0, or leave the adapter out"
            )

    def default_kinds(self) -> tuple[str, ...]:
        """Return the sublayers that attend."""
        return ("attention",)

    def lacks(self, site: Site) -> str | None:
        """Say that only attention can attend to more."""
        return None if site.kind == "attention" else "it does not attend"

    def check_base(self, base: PreTrainedModel, parts: Anatomy) -> None:
        """Refuse to tell image tokens from text where no sequence holds both."""
        holds_both = bool(image_tokens_of(base)) and not base.config.is_encoder_decoder
        if self.image_length is not None and not holds_both and any(t.name == "language" for t in parts.towers):
            raise ValueError(
                f"Prefix(image_length={self.image_length}) serves image tokens apart from text, but no sequence of "
                f"{type(base).__name__} holds both; leave image_length unset"
            )

    def rows(self, tower: str) -> dict[str, int]:
        """Return how many rows it has at a site of a tower, by whom they serve."""
        if self.image_length is None:
            return {"all": self.length}
        found = {"image": self.image_length} if tower == "vision" else {"text": self.length, "image": self.image_length}
        return {kind: count for kind, count in found.items() if count}

    @classmethod
    def bank(cls, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> "PrefixBank":
        """Build the stack of one site.

        Raises:
            ValueError: The module has no attention to join, or the adapters serve different tokens.
        """
        return PrefixBank(site, adapters, module)


class PrefixBank(StackedBank):
    """All prefixes of one attention, stacked along their rows.

    Args:
        site: Where.
        adapters: Shared first, then experts.
        module: The frozen module there.

    Raises:
        ValueError: The module has no attention to join, or the adapters serve different tokens.
    """

    runs_module = True
    vectors = frozenset(f"{kind}_gates" for kind in KINDS)

    def __init__(self, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> None:
        self.path, self.heads = _attention(site, module)
        self.kinds = self._kinds(site, adapters)
        self.tensors = tuple(f"{kind}_{part}" for kind in self.kinds for part in ("keys", "values", "gates"))
        self.indexed = tuple(f"{kind}_keys" for kind in self.kinds)
        super().__init__(site, adapters, module)

    def fresh(self, spec: Prefix) -> dict[str, Tensor]:
        """Return keys `(n, K, d)`, of unit size, values `(n, K, d)` as small as 1/sqrt(d), and gates `(1, H)`, shut."""
        found: dict[str, Tensor] = {}
        for kind, count in spec.rows(self.site.tower).items():
            shape, device = (count, self.heads.keys, self.heads.width), self.owner(self.tensors[0]).device
            found[f"{kind}_keys"] = torch.randn(shape, device=device)  # products with queries are then of their size
            found[f"{kind}_values"] = torch.randn(shape, device=device) * self.heads.width**-0.5
            found[f"{kind}_gates"] = torch.zeros(1, self.heads.queries, device=device)
        return found

    def adapt(
        self, module: nn.Module, x: Tensor, routing: Routing | None, call: Call | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the base's attention, which adds what its queries read from the prefixes."""
        if not self.names:
            return module(x, *args, **kwargs)
        add = partial(self.read, weights=all_weights(routing, x), image=None if call is None else call.image)
        with adding(module.get_submodule(self.path), add):
            return module(x, *args, **kwargs)

    def change(self, x: Tensor, y: Tensor, weights: Tensor, call: Call | None) -> Tensor:
        """Refuse: what is added depends on the queries, which only `adapt` meets.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(f"{self.site.path}: prefixes are read within attention; run the bank by `adapt`")

    def read(self, query: Tensor, scaling: float, *, weights: Tensor, image: Tensor | None) -> Tensor:
        """Return what queries read from all prefixes.

        Args:
            query: (B, H, T, d).
            scaling: Factor s of products of queries and keys.
            weights: As `change` gets them, (B|1, T|1, 1, 1 + E).
            image: Which tokens stand for image patches, (B, T).

        Returns:
            (B, T, H, d).

        Raises:
            ValueError: The queries have other shapes than the prefixes, or image and text tokens cannot be told apart.
        """
        if (query.shape[1], query.shape[3]) != (self.heads.queries, self.heads.width):
            raise ValueError(
                f"{self.site.path}: the prefixes are made for {self.heads.queries} heads of {self.heads.width}, but "
                f"the queries have shape {tuple(query.shape)}; place no prefix here"
            )
        if self.site.tower == "vision" or self.kinds == ("all",):
            (kind,) = self.kinds
            return self._read(kind, query, scaling, weights)
        if image is None or image.shape != (query.shape[0], query.shape[2]):
            raise ValueError(
                f"{self.site.path}: image_length tells image tokens from text, which this call does not, or not for "
                f"queries of shape {tuple(query.shape)}; pass input_ids, or leave image_length unset"
            )
        serves = {"text": ~image, "image": image}
        served = (weights * serves[kind][:, :, None, None] for kind in self.kinds)
        parts = [self._read(kind, query, scaling, each) for kind, each in zip(self.kinds, served, strict=True)]
        return torch.stack(parts).sum(dim=0)

    def delta(self, weights: Tensor) -> Delta:
        """Refuse.

        Raises:
            NotMergeable: Always.
        """
        raise NotMergeable(
            f"{self.site.path}: a prefix is more keys and values to attend to, so no weight of the base can hold it; "
            "keep the mixture, or merge another family"
        )

    def readings(self) -> dict[str, float]:
        """Return how far gates are open, the mean of |tanh g|, as `gate/<adapter>/<whom the rows serve>`."""
        return {
            f"gate/{name}/{kind}": float(self.live(name, f"{kind}_gates").detach().tanh().abs().mean())
            for name in self.names
            for kind in self.kinds
        }

    def _kinds(self, site: Site, adapters: Sequence[Adapter]) -> tuple[str, ...]:
        asked = {adapter.name: tuple(_spec(adapter).rows(site.tower)) for adapter in adapters}
        if not all(asked.values()) or len(set(asked.values())) > 1:
            raise ValueError(
                f"{site.path}: prefixes of one site serve the same tokens, and some; got {asked}; give all of them an "
                "image_length or none, or place them apart"
            )
        return next(iter(asked.values()))

    def _read(self, kind: str, query: Tensor, scaling: float, weights: Tensor) -> Tensor:
        keys, values = (self.stack(f"{kind}_{part}").to(query.dtype) for part in ("keys", "values"))
        grouped = rearrange(query, "b (k g) t d -> b k g t d", k=self.heads.keys)
        products = torch.einsum("bkgtd,rkd->bkgtr", grouped, keys) * scaling
        exact = torch.promote_types(query.dtype, torch.float32)
        parts = torch.split(products, self.counts(f"{kind}_keys"), dim=-1)
        shares = torch.cat([part.softmax(dim=-1, dtype=exact) for part in parts], dim=-1)
        weighed = shares * self._openness(kind, weights).to(exact)
        read = torch.einsum("bkgtr,rkd->btkgd", weighed.to(query.dtype), values)
        return rearrange(read, "b t k g d -> b t (k g) d")

    def _openness(self, kind: str, weights: Tensor) -> Tensor:
        """Return weight times gate of every row, (B|1, K, H/K, T|1, R)."""
        gates = self.stack(f"{kind}_gates").tanh()  # (adapters, H)
        each = self.spread(weights, f"{kind}_gates")[:, :, 0, None, :] * gates.T  # (B|1, T|1, H, adapters)
        of_rows = each[..., self.adapter_of(f"{kind}_keys")]
        return rearrange(of_rows, "b t (k g) r -> b k g t r", k=self.heads.keys)


def _attention(site: Site, module: nn.Module) -> tuple[str, Heads]:
    """Return where in a sublayer its attention is, and its shapes."""
    path = attention_in(module)
    heads = None if path is None else heads_of(module.get_submodule(path))
    if path is None or heads is None:
        raise ValueError(
            f"{site.path} is a {type(module).__name__}, which holds no single attention that goes through "
            "transformers' attention interface and tells its heads, so no prefix can join it; place prefixes elsewhere"
        )
    return path, heads


def _spec(adapter: Adapter) -> Prefix:
    assert isinstance(adapter.spec, Prefix), "the mixture groups adapters by family"
    return adapter.spec
