"""Placement: which sites an adapter sits at, in words that hold for every base."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from moadapt.misplaced import ambiguity, misplacement, told
from moadapt.sites import KINDS, Anatomy, Site
from moadapt.towers import TOWERS

Depth = tuple[float, float]


class Placeable(Protocol):
    """What a placement asks of an adapter family."""

    @property
    def forms(self) -> tuple[str, ...]:
        """Forms of site that it can sit at."""

    def by_default(self, site: Site) -> bool:
        """Tell whether it sits at a site unless told otherwise."""

    def lacks(self, site: Site) -> str | None:
        """Say why it cannot sit at a site of its forms; None where it can."""


@dataclass(frozen=True)
class Placement:
    """Which sites an adapter sits at.

    Args:
        towers: Names of towers; None is the towers that `depth` or `modules` name, else the language tower where there
            is one, else every tower.
        kinds: Kinds of site in a tower's blocks; None is what the adapter's family sits at by default, for LoRA
            `attention` and `mlp`. A chosen connector is taken whole.
        depth: First and last fraction of each tower's blocks, between 0 and 1; `(0.5, 1)` is the upper half: a block is
            in if it begins in the interval. Or such a pair by tower, other towers being taken whole. Encoder and
            decoder have a depth each.
        every: Take every n-th block, counted from the first one in the interval.
        modules: Module names (`q_proj`) or whole paths; None is every module of those kinds.
        unread: Whether to take also what the model computes but never reads, such as the last vision block of LLaVA,
            where adapters get no gradient.

    Raises:
        ValueError: A tower or kind is unknown, something is empty or text in the place of a list, the depth is no
            interval within 0 and 1, or `every` is below 1.
    """

    towers: tuple[str, ...] | None = None
    kinds: tuple[str, ...] | None = None
    depth: Depth | Mapping[str, Depth] = field(default=(0.0, 1.0), hash=False)
    every: int = 1
    modules: tuple[str, ...] | None = None
    unread: bool = False

    def __post_init__(self) -> None:
        """Check names and intervals."""
        for name in ("towers", "kinds", "modules"):
            if isinstance(given := getattr(self, name), str):
                raise ValueError(f"placement got {name}={given!r}; give a list, such as [{given}]")
        for name in ("towers", "modules", "depth"):
            if (given := getattr(self, name)) is not None and not len(given):
                raise ValueError(f"placement got {name} empty; name what is wanted, or leave {name} out")
        by_tower = self.depth if isinstance(self.depth, Mapping) else {}
        for given, known in (
            (self.towers or (), TOWERS),
            (self.kinds or (), KINDS),
            (by_tower, TOWERS if self.towers is None else self.towers),
        ):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise ValueError(f"placement names {', '.join(unknown)}; choose from {', '.join(known)}")
        if isinstance(self.depth, Mapping):  # pairs read from a file are lists
            object.__setattr__(self, "depth", {name: tuple(pair) for name, pair in self.depth.items()})
        for pair in by_tower.values() if isinstance(self.depth, Mapping) else (self.depth,):
            if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= 1:
                raise ValueError(f"placement depth is {pair}; give two fractions with 0 <= first < last <= 1")
        if self.every < 1:
            raise ValueError(f"placement takes every {self.every}-th block; give 1 or more")

    @classmethod
    def named(cls, name: str) -> "Placement":
        """Return one of `NAMED`; in YAML its name alone stands for it.

        Raises:
            ValueError: There is no such placement; the names are listed.
        """
        if name not in NAMED:
            raise ValueError(
                f"no placement is called {name!r}; there are {', '.join(NAMED)}; or give towers, kinds, depth, every"
            )
        return NAMED[name]

    def sites(self, parts: Anatomy, family: Placeable) -> tuple[Site, ...]:
        """Return the sites that this chooses for an adapter.

        Args:
            parts: Anatomy of the base.
            family: Spec of the adapter.

        Raises:
            ValueError: It chooses none, and the message lists what there is; or a module name is found in several
                towers, and none was named.
        """
        towers = self._towers(parts)
        possible = parts.of_form(*family.forms, unread=self.unread)
        named = [s for s in possible if self._is_named(s, family) and (towers is None or s.tower in towers)]
        if towers is None:
            self._refuse_ambiguous(named)
        chosen = self._at_depth(parts, named)
        if not chosen:
            why = misplacement(self.modules, self.kinds, parts, family)
            depth = f"no block begins at depth {self.depth}; " if named else ""
            raise ValueError(f"{told(self)} matches no site of this base; {depth}{why}")
        able = tuple(site for site in chosen if family.lacks(site) is None)
        if not able:
            reasons = {family.lacks(site): site.path for site in reversed(chosen)}
            examples = "; ".join(f"{path}: {reason}" for reason, path in reversed(reasons.items()))
            raise ValueError(
                f"{told(family)} can sit at none of the {len(chosen)} sites that {told(self)} matches, "
                f"such as {examples}"
            )
        return able

    def _towers(self, parts: Anatomy) -> tuple[str, ...] | None:
        """Return the towers to look in; None where names of modules must say it."""
        if self.towers is not None:
            return self.towers
        if isinstance(self.depth, Mapping):
            return tuple(self.depth)
        if self.modules is not None:
            return None
        return ("language",) if any(tower.name == "language" for tower in parts.towers) else TOWERS

    def _is_named(self, site: Site, family: Placeable) -> bool:
        if self.modules is not None:
            return any(site.path == name or site.path.endswith("." + name) for name in self.modules)
        chosen = family.by_default(site) if self.kinds is None else site.kind in self.kinds
        return chosen or site.tower == "connector"

    def _refuse_ambiguous(self, named: list[Site]) -> None:
        for name in self.modules or ():
            found = [site for site in named if site.path.endswith("." + name)]
            if len({site.tower for site in found}) > 1 and all(site.path != name for site in named):
                raise ValueError(f"{told(self)}: {ambiguity(name, found)}")

    def _at_depth(self, parts: Anatomy, named: list[Site]) -> tuple[Site, ...]:
        layers = {tower: self.layers(parts, tower) for tower in {site.tower for site in named}}
        return tuple(s for s in named if s.layer is None or s.layer in layers[s.tower])

    def layers(self, parts: Anatomy, tower: str) -> frozenset[int]:
        """Return the blocks of a tower that this chooses, read or not.

        Args:
            parts: Anatomy of the base.
            tower: Name of the tower.
        """
        found = parts.tower(tower)
        low, high = self.depth.get(tower, (0.0, 1.0)) if isinstance(self.depth, Mapping) else self.depth
        chosen: list[int] = []
        for first, count in found.starts():
            inside = [i for i in range(count) if low * count - 1e-6 <= i < high * count - 1e-6]
            chosen += [first + i for i in inside[:: self.every]]
        return frozenset(chosen)


_BLOCKS = ("vision", "language")
NAMED = {
    "all": Placement(towers=_BLOCKS),
    "top": Placement(towers=("language",), depth=(0.5, 1.0)),
    "bottom": Placement(towers=("vision",), depth=(0.0, 0.5)),
    "sparse": Placement(towers=_BLOCKS, every=2),
    "vision": Placement(towers=("vision",)),
    "language": Placement(towers=("language",)),
}
"""Published strategies over the blocks of both towers: all of them, the upper half of the language tower, the lower
half of the vision tower, every second block, one tower alone."""
