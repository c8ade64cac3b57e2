"""Anatomy of a base: its towers and the sites in them.

A site is a module that can carry adapters. Its form says what can be done there, its kind what it does in the base.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moadapt.towers import Tower, block_width, find_towers, has_linear, is_causal, tower_of
from moadapt.unread import is_unread

FORMS = ("linear", "embedding", "conv2d", "experts", "norm", "sublayer", "entry")
KINDS = ("attention", "mlp", "projector", "experts", "norm", "embedding", "entry", "other")
_INSIDE = {
    "attention": {
        "self_attn", "self_attention", "cross_attn", "crossattention", "attn", "attention", "encoder_attn",
        "linear_attn", "window_attn", "channel_attn", "SelfAttention", "EncDecAttention",
    },
    "mlp": {"mlp", "feed_forward", "ffn", "ffn_output", "intermediate", "output", "fc1", "fc2", "wi", "wo",
        "dense_h_to_4h", "DenseReluDense",
    },
}  # fmt: skip
_SUBLAYERS = {"attention": _INSIDE["attention"], "mlp": {"mlp", "feed_forward", "ffn", "DenseReluDense"}}


@dataclass(frozen=True)
class Site:
    """One module of the base that can carry adapters.

    Args:
        path: Module path in the base, such as `model.layers.3.self_attn.q_proj`.
        tower: `vision`, `connector` or `language`.
        kind: One of `KINDS`.
        layer: Index of its block in the tower; None outside the stack of blocks.
        in_features: D; for an embedding its number of rows, for a convolution the numbers that one output reads.
        out_features: F.
        form: What the module is: a `linear` layer (stored either way round), the token `embedding`, a `conv2d`, the
            fused `experts` of a mixture-of-experts block, a `norm`, a whole `sublayer` of a block (attention or MLP),
            or the `entry`, where text and image features enter the first block of the language tower.
        has_bias: Whether the module has a bias.
        causal: Whether tokens must not read later ones there.
    """

    path: str
    tower: str
    kind: str
    layer: int | None
    in_features: int
    out_features: int
    form: str = "linear"
    has_bias: bool = False
    causal: bool = False


@dataclass(frozen=True)
class Anatomy:
    """The towers and sites of one base, sites in model order."""

    towers: tuple[Tower, ...]
    sites: tuple[Site, ...]
    unread: tuple[Site, ...] = field(default=())
    """Sites that the model computes but never reads; nothing is placed there unless asked for."""

    def tower(self, name: str) -> Tower:
        """Return a tower by name.

        Raises:
            ValueError: The base has no such tower.
        """
        for tower in self.towers:
            if tower.name == name:
                return tower
        raise ValueError(f"this base has no {name!r} tower; it has {', '.join(tower.name for tower in self.towers)}")

    def of_form(self, *forms: str, unread: bool = False) -> tuple[Site, ...]:
        """Return the sites of some forms.

        Args:
            forms: Of `FORMS`.
            unread: Whether to add those that the model never reads, after the others.
        """
        found = (*self.sites, *self.unread) if unread else self.sites
        return tuple(site for site in found if site.form in forms)


def anatomy(base: PreTrainedModel) -> Anatomy:
    """Find the towers and sites of a base.

    Args:
        base: Any transformers model.
    """
    towers = tuple(find_towers(base))
    within = cache(partial(is_causal, base, towers))
    sites: list[Site] = []
    unread: list[Site] = []
    for path, module in base.named_modules():
        tower = tower_of(path, towers)
        if tower is None:
            continue
        layer = next((i for i, block in enumerate(tower.blocks) if (path + ".").startswith(block + ".")), None)
        never = is_unread(base, path, tower, layer)
        causal = within(tower, layer)
        for site in _sites_at(base, path, module, tower, layer):
            (unread if never else sites).append(replace(site, causal=causal))
    return Anatomy(towers, tuple(sites), tuple(unread))


def _sites_at(base: PreTrainedModel, path: str, module: Any, tower: Tower, layer: int | None) -> Iterator[Site]:
    """Return the site that a module is, if any."""
    kind = _kind(path, tower, layer)
    if isinstance(module, nn.Linear) and not _is_read_only(base, path):
        bias = module.bias is not None
        yield Site(path, tower.name, kind, layer, module.in_features, module.out_features, has_bias=bias)
    elif isinstance(module, Conv1D):
        yield Site(path, tower.name, kind, layer, module.nx, module.nf, has_bias=True)
    elif isinstance(module, nn.Embedding) and module is base.get_input_embeddings() and not _is_a_copy(base, module):
        yield Site(path, tower.name, "embedding", layer, module.num_embeddings, module.embedding_dim, "embedding")
    elif isinstance(module, nn.Conv2d) and module.groups == 1:
        read = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
        name = kind if layer is not None else "embedding"
        yield Site(path, tower.name, name, layer, read, module.out_channels, "conv2d")
    elif _is_norm(module):
        width, bias = module.weight.numel(), getattr(module, "bias", None) is not None
        yield Site(path, tower.name, "norm", layer, width, width, "norm", bias)
    elif _holds_experts(module):
        width = module.down_proj.shape[1 if not getattr(module, "is_transposed", False) else 2]
        yield Site(path, tower.name, "experts", layer, width, width, "experts")
    elif layer is not None and (width := block_width(base.get_submodule(tower.blocks[layer]))) is not None:
        if _is_entry(base, path, tower):
            yield Site(path, tower.name, "entry", layer, width, width, "entry")
        elif (part := _sublayer(path, tower.blocks[layer])) is not None and has_linear(module):
            yield Site(path, tower.name, part, layer, width, width, "sublayer")


def _is_read_only(base: PreTrainedModel, path: str) -> bool:
    """Tell whether a linear is never called, as its owner hands its weight to a kernel."""
    return isinstance(base.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention)


def _is_a_copy(base: PreTrainedModel, embedding: nn.Embedding) -> bool:
    """Tell whether an embedding only keeps a weight that encoder and decoder look up by embeddings of their own."""
    others = (m for m in base.modules() if isinstance(m, nn.Embedding) and m is not embedding)
    return any(other.weight is embedding.weight for other in others)


def _is_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("Norm") and isinstance(weight, nn.Parameter) and weight.ndim == 1


def _holds_experts(module: Any) -> bool:
    """Tell whether a module keeps the experts of a mixture-of-experts block as stacked parameters."""
    found = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return all(isinstance(each, nn.Parameter) and each.ndim == 3 for each in found)


def _is_entry(base: PreTrainedModel, path: str, tower: Tower) -> bool:
    return tower.name == "language" and path == tower.blocks[0] and not base.config.is_encoder_decoder


def _sublayer(path: str, block: str) -> str | None:
    """Return the kind of a sublayer; None for what is none, or lies inside another one."""
    *outer, name = path.removeprefix(block).strip(".").split(".")
    if any(part in names for part in outer for names in _SUBLAYERS.values()):
        return None
    return next((kind for kind, names in _SUBLAYERS.items() if name in names), None)


def _kind(path: str, tower: Tower, layer: int | None) -> str:
    if tower.name == "connector":
        return "projector"
    if layer is None:
        return "other"
    parts = set(path.removeprefix(tower.path).split("."))
    return next((kind for kind, names in _INSIDE.items() if parts & names), "other")
