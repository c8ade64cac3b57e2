"""Anatomy of a base: its towers, their depth, the sites in them, and placement.

Towers are found through transformers' own accessors and by exact attribute names, never by substring. A site is a
module that can carry adapters; a placement chooses sites by tower, kind and fraction of depth.
"""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

TOWERS = ("vision", "connector", "language")
_CONNECTORS = {
    "multi_modal_projector",
    "connector",
    "language_projection",
    "qformer",
    "embed_vision",
    "merger",
    "deepstack_merger_list",
}
_KINDS = {
    "attention": {
        "self_attn", "self_attention", "cross_attn", "crossattention", "attn", "attention", "encoder_attn",
        "linear_attn", "window_attn", "channel_attn", "SelfAttention", "EncDecAttention",
    },
    "mlp": {"mlp", "feed_forward", "ffn", "intermediate", "output", "fc1", "fc2", "wi", "wo", "dense_h_to_4h",
        "DenseReluDense",
    },
}  # fmt: skip
KINDS = ("attention", "mlp", "projector", "other")


@dataclass(frozen=True)
class Site:
    """One module of the base that can carry adapters.

    Args:
        path: Module path in the base, such as `model.layers.3.self_attn.q_proj`.
        tower: `vision`, `connector` or `language`.
        kind: `attention`, `mlp`, `projector` or `other`.
        layer: Index of its block in the tower; None outside the stack of blocks.
        in_features: D.
        out_features: F.
    """

    path: str
    tower: str
    kind: str
    layer: int | None
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Tower:
    """One part of the base.

    Args:
        name: `vision`, `connector` or `language`.
        path: Module path of its root.
        blocks: Module paths of its blocks, first to last.
        num_read: How many of the blocks can influence the output.
    """

    name: str
    path: str
    blocks: tuple[str, ...]
    num_read: int


@dataclass(frozen=True)
class Placement:
    """Which sites an adapter sits at.

    Args:
        towers: Names of towers; None is the language tower where there is one, else every tower.
        kinds: Kinds of site in a tower's blocks; a chosen connector is taken whole.
        depth: First and last fraction of each tower's blocks, between 0 and 1; `(0.5, 1)` is the upper half.
        modules: Module names (`q_proj`) or whole paths; None is every module of those kinds.

    Raises:
        ValueError: A tower or kind is unknown, or the depth is no interval within 0 and 1.
    """

    towers: tuple[str, ...] | None = None
    kinds: tuple[str, ...] = ("attention", "mlp")
    depth: tuple[float, float] = (0.0, 1.0)
    modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check names and interval."""
        for given, known in ((self.towers or (), TOWERS), (self.kinds, KINDS)):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise ValueError(f"placement names {', '.join(unknown)}; choose from {', '.join(known)}")
        low, high = self.depth
        if not 0 <= low < high <= 1:
            raise ValueError(f"placement depth is {self.depth}; give two fractions with 0 <= first < last <= 1")


@dataclass(frozen=True)
class Anatomy:
    """The towers and sites of one base."""

    towers: tuple[Tower, ...]
    sites: tuple[Site, ...]
    unread: tuple[Site, ...] = field(default=())
    """Sites in blocks that the model computes but never reads; nothing is placed there."""

    def tower(self, name: str) -> Tower:
        """Return a tower by name.

        Raises:
            ValueError: The base has no such tower.
        """
        for tower in self.towers:
            if tower.name == name:
                return tower
        raise ValueError(f"this base has no {name!r} tower; it has {', '.join(tower.name for tower in self.towers)}")

    def place(self, placement: Placement) -> tuple[Site, ...]:
        """Return the sites that a placement chooses.

        Raises:
            ValueError: It chooses none; the message lists what there is.
        """
        default = ("language",) if any(t.name == "language" for t in self.towers) else TOWERS
        towers = placement.towers or default
        chosen = tuple(s for s in self.sites if s.tower in towers and self._matches(s, placement))
        if not chosen:
            raise ValueError(f"{placement} matches no site of this base; {self._near(placement)}")
        return chosen

    def _matches(self, site: Site, placement: Placement) -> bool:
        if placement.modules is not None:
            if not _named(site.path, placement.modules):
                return False
        elif site.kind not in placement.kinds and site.tower != "connector":
            return False
        if site.layer is None:
            return True
        low, high = (bound * len(self.tower(site.tower).blocks) for bound in placement.depth)
        return low - 1e-6 <= site.layer < high - 1e-6

    def _near(self, placement: Placement) -> str:
        names = sorted({site.path.rsplit(".", 1)[-1] for site in self.sites})
        near = [n for wanted in placement.modules or () for n in difflib.get_close_matches(wanted, names, n=3)]
        found = ", ".join(f"{t.name} ({len(t.blocks)} blocks)" for t in self.towers)
        told = f"near names: {', '.join(near) or 'none'}; towers: {found}; modules: {', '.join(names) or 'none'}"
        if any(tower.blocks for tower in self.towers):
            return told
        return f"no block holds an nn.Linear, and other layers such as Conv1D are not supported; {told}"


def anatomy(base: PreTrainedModel) -> Anatomy:
    """Find the towers and sites of a base.

    Args:
        base: Any transformers model.
    """
    towers = tuple(_towers(base))
    sites: list[Site] = []
    unread: list[Site] = []
    for path, module in base.named_modules():
        tower = _tower_of(path, towers)
        if tower is None or not isinstance(module, nn.Linear) or _is_read_only(base, path):
            continue
        layer = next((i for i, block in enumerate(tower.blocks) if path.startswith(block + ".")), None)
        kind = _kind(path, tower, layer)
        site = Site(path, tower.name, kind, layer, module.in_features, module.out_features)
        (unread if layer is not None and layer >= tower.num_read else sites).append(site)
    return Anatomy(towers, tuple(sites), tuple(unread))


def _is_read_only(base: PreTrainedModel, path: str) -> bool:
    """Tell whether a linear is never called, as its owner hands its weight to a kernel."""
    return isinstance(base.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention)


def _towers(base: PreTrainedModel) -> Iterator[Tower]:
    paths = {id(module): path for path, module in base.named_modules()}
    vision = _vision_root(base)
    language = None if vision is base else base if vision is None else base.get_decoder()
    vision_path = paths.get(id(vision)) if vision is not None else None
    connectors = [p for p in paths.values() if p and p.rsplit(".", 1)[-1] in _CONNECTORS]
    for path in connectors:
        if not any(path.startswith(other + ".") for other in connectors):
            yield Tower("connector", path, (), 0)
    if vision is not None and vision_path is not None:
        blocks = tuple(_blocks(vision, vision_path))
        yield Tower("vision", vision_path, blocks, _num_read(base, len(blocks)))
    if language is not None:
        path = paths[id(language)]
        blocks = tuple(_blocks(language, path))
        yield Tower("language", path, blocks, len(blocks))


def _vision_root(base: PreTrainedModel) -> nn.Module | None:
    if base.main_input_name == "pixel_values" and not hasattr(base.config, "text_config"):
        return base
    root = base.get_encoder("image")
    return None if root is None or root is base else root


def _blocks(root: nn.Module, path: str) -> Iterator[str]:
    """Paths of the blocks in a tower's stacks, leaving out lists inside blocks and connectors."""
    stacks: list[str] = []
    for name, module in root.named_modules(prefix=path):
        is_stack = isinstance(module, nn.ModuleList) and len(module) > 0 and _has_linear(module[0])
        inside = any(name.startswith(stack + ".") for stack in stacks)
        if is_stack and not inside and name.rsplit(".", 1)[-1] not in _CONNECTORS:
            stacks.append(name)
            yield from (f"{name}.{i}" for i in range(len(module)))


def _has_linear(block: nn.Module) -> bool:
    return any(isinstance(module, nn.Linear) for module in block.modules())


def _num_read(base: PreTrainedModel, count: int) -> int:
    """How many vision blocks lie before the deepest hidden state that the model reads."""
    read = getattr(base.config, "vision_feature_layer", None)
    if read is None:
        return count
    layers = [read] if isinstance(read, int) else list(read)
    return max(layer if layer >= 0 else count + 1 + layer for layer in layers)


def _tower_of(path: str, towers: Iterable[Tower]) -> Tower | None:
    for tower in towers:
        if not tower.path or path == tower.path or path.startswith(tower.path + "."):
            return tower
    return None


def _kind(path: str, tower: Tower, layer: int | None) -> str:
    if tower.name == "connector":
        return "projector"
    if layer is None:
        return "other"
    parts = set(path.removeprefix(tower.path).split("."))
    for kind, names in _KINDS.items():
        if parts & names:
            return kind
    return "other"


def _named(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith("." + name) for name in names)
