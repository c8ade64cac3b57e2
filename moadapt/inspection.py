"""What a base is made of, and what an adapter on it would add: sites, parameters, arithmetic, memory.

Everything is read off shapes, so a base on the meta device, which has no weights, will do.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from moadapt.adapters.family import FamilySpec
from moadapt.attaching import attach
from moadapt.costs import Cost, cost_at
from moadapt.registry import FAMILIES
from moadapt.sites import Anatomy, Site, anatomy
from moadapt.specs import to_json
from moadapt.towers import TOWERS, tower_of


@dataclass(frozen=True)
class TowerReport:
    """One tower, or what lies outside all of them.

    Args:
        name: `vision`, `connector`, `language` or `outside`.
        paths: Module paths of its roots.
        blocks: How many blocks it has.
        read: How many of them can influence the output.
        parameters: Numbers in it, shared ones counted once.
        adapted: The blocks that get adapters.
        added: Numbers that the adapter adds.
        flops_per_token: Operations that the adapter adds for each token of the tower; None where it cannot be told.
        base_flops_per_token: Those of the base's own linear layers that are read.
        saved_per_token: Bytes kept for backward for each token, at most: the inputs of the sites are among them, each
            counted by itself though sites may share them; None where it cannot be told.
    """

    name: str
    paths: tuple[str, ...]
    blocks: int
    read: int
    parameters: int
    adapted: tuple[int, ...] = ()
    added: int = 0
    flops_per_token: int | None = 0
    base_flops_per_token: int = 0
    saved_per_token: int | None = 0


@dataclass(frozen=True)
class SiteGroup:
    """Sites of one tower, form, kind and size.

    Args:
        tower: Name of the tower.
        form: What the modules are, see `moadapt.sites.Site`.
        kind: What they do in the base.
        shape: Features in and out.
        modules: Their names in a block, or in the tower.
        layers: Blocks that have such sites.
        read: Whether they can influence the output.
        sites: How many there are.
        adapted: How many of them get adapters.
        added: Numbers that the adapter adds there.
    """

    tower: str
    form: str
    kind: str
    shape: tuple[int, int]
    modules: tuple[str, ...]
    layers: tuple[int, ...]
    read: bool
    sites: int
    adapted: int
    added: int


@dataclass(frozen=True)
class Memory:
    """Bytes that one adapter needs.

    Args:
        parameters: Of its numbers, in training and in use until merged.
        gradients: In training.
        optimizer: AdamW's two moments.
        merged: What is left of it in use once merged; None for a family that cannot be merged.
    """

    parameters: int
    gradients: int
    optimizer: int
    merged: int | None


@dataclass(frozen=True)
class Inspection:
    """What a base is made of, and what one adapter would add.

    Args:
        base: Class of the base.
        parameters: Numbers in it.
        adapter: The adapter's spec.
        added: Numbers that it adds.
        added_by_layer: Those by tower and block; sites outside the blocks stand at block None.
        towers: In the order in which they run, then what lies outside.
        groups: All sites.
        unread: Blocks, and sites outside the blocks, that the base computes but never reads.
        memory: Bytes that it needs.
    """

    base: str
    parameters: int
    adapter: dict[str, Any]
    added: int
    added_by_layer: tuple[tuple[str, int | None, int], ...]
    towers: tuple[TowerReport, ...]
    groups: tuple[SiteGroup, ...]
    unread: tuple[str, ...]
    memory: Memory

    def as_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return asdict(self)


def inspection(base: PreTrainedModel, adapter: FamilySpec) -> Inspection:
    """Attach an adapter for a moment and count.

    Args:
        base: Any transformers model, best on the meta device.
        adapter: The adapter, which sits where its placement says.

    Raises:
        ValueError: The adapter can sit nowhere on this base.
    """
    parts = anatomy(base)
    modules = {site: base.get_submodule(site.path) for site in (*parts.sites, *parts.unread)}
    mixture = attach(base, shared=adapter)
    try:
        banks = dict(mixture.banks())
        kept = {id(p): p for _, p in mixture.named_adapter_parameters()}
    finally:
        mixture.detach()
    added = {site: sum(p.numel() for p in bank.parameters()) for site, bank in banks.items()}
    costs = {site: cost_at(site, bank.to("meta"), modules[site], base.dtype) for site, bank in banks.items()}
    size = sum(p.numel() for p in kept.values())
    bytes_ = sum(p.numel() * p.element_size() for p in kept.values())
    return Inspection(
        base=type(base).__name__,
        parameters=sum(p.numel() for p in base.parameters()),
        adapter=to_json(adapter, FAMILIES),
        added=size,
        added_by_layer=_by_layer(added),
        towers=tuple(_towers(base, parts, added, costs)),
        groups=_groups(parts, added),
        unread=unread_names(parts),
        memory=Memory(bytes_, bytes_, 2 * bytes_, 0 if adapter.mergeable else None),
    )


def unread_names(parts: Anatomy) -> tuple[str, ...]:
    """Return paths of the blocks that a base never reads, then of such sites outside the blocks.

    Args:
        parts: Anatomy of the base.
    """
    blocks = [block for tower in parts.towers for block in tower.blocks[tower.num_read :]] if parts.unread else []
    return (*blocks, *(site.path for site in parts.unread if site.layer is None))


def _by_layer(added: dict[Site, int]) -> tuple[tuple[str, int | None, int], ...]:
    total: dict[tuple[str, int | None], int] = defaultdict(int)
    for site, count in added.items():
        total[site.tower, site.layer] += count
    return tuple((tower, layer, count) for (tower, layer), count in total.items())


def _towers(
    base: PreTrainedModel, parts: Anatomy, added: dict[Site, int], costs: dict[Site, Cost | None]
) -> Iterable[TowerReport]:
    sizes: dict[str, int] = defaultdict(int)
    for path, parameter in base.named_parameters():
        tower = tower_of(path, parts.towers)
        sizes[tower.name if tower else "outside"] += parameter.numel()
    for name in (*TOWERS, "outside"):
        here = [tower for tower in parts.towers if tower.name == name]
        if not here and not sizes[name]:
            continue
        sites = [site for site in added if site.tower == name]
        own = [site for site in parts.of_form("linear") if site.tower == name]
        yield TowerReport(
            name,
            tuple(tower.path for tower in here),
            sum(len(tower.blocks) for tower in here),
            sum(tower.num_read for tower in here),
            sizes[name],
            tuple(sorted({site.layer for site in sites if site.layer is not None})),
            sum(added[site] for site in sites),
            _total([None if (cost := costs[site]) is None else cost.flops for site in sites]),
            sum(2 * site.in_features * site.out_features for site in own),
            _total([None if (cost := costs[site]) is None else cost.saved for site in sites]),
        )


def _total(values: Sequence[int | None]) -> int | None:
    """Add up; nothing can be told where one value is missing."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _groups(parts: Anatomy, added: dict[Site, int]) -> tuple[SiteGroup, ...]:
    alike: dict[tuple[str, str, str, tuple[int, int], bool], list[Site]] = defaultdict(list)
    for sites, read in ((parts.sites, True), (parts.unread, False)):
        for site in sites:
            alike[site.tower, site.form, site.kind, (site.in_features, site.out_features), read].append(site)
    return tuple(
        SiteGroup(
            *key[:4],
            modules=tuple(dict.fromkeys(_name(site.path) for site in sites)),
            layers=tuple(sorted({site.layer for site in sites if site.layer is not None})),
            read=key[4],
            sites=len(sites),
            adapted=sum(site in added for site in sites),
            added=sum(added.get(site, 0) for site in sites),
        )
        for key, sites in sorted(alike.items(), key=lambda item: TOWERS.index(item[0][0]))
    )


def _name(path: str) -> str:
    """Return the last part of a path, and the one before it where that is a number."""
    parts = path.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
