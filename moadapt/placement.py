"""Placement: which sites an adapter sits at, in words that hold for every base."""

import difflib
from dataclasses import dataclass
from typing import Protocol

from moadapt.sites import KINDS, Anatomy, Site
from moadapt.towers import TOWERS


class Placeable(Protocol):
    """What a placement asks of an adapter family."""

    @property
    def forms(self) -> tuple[str, ...]:
        """Forms of site that it can sit at."""

    def default_kinds(self) -> tuple[str, ...]:
        """Kinds of site that it sits at unless told otherwise."""


@dataclass(frozen=True)
class Placement:
    """Which sites an adapter sits at.

    Args:
        towers: Names of towers; None is the language tower where there is one, else every tower.
        kinds: Kinds of site in a tower's blocks; None is what the adapter's family sits at by default, for LoRA
            `attention` and `mlp`. A chosen connector is taken whole.
        depth: First and last fraction of each tower's blocks, between 0 and 1; `(0.5, 1)` is the upper half.
        modules: Module names (`q_proj`) or whole paths; None is every module of those kinds.

    Raises:
        ValueError: A tower or kind is unknown, or the depth is no interval within 0 and 1.
    """

    towers: tuple[str, ...] | None = None
    kinds: tuple[str, ...] | None = None
    depth: tuple[float, float] = (0.0, 1.0)
    modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check names and interval."""
        for given, known in ((self.towers or (), TOWERS), (self.kinds or (), KINDS)):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise ValueError(f"placement names {', '.join(unknown)}; choose from {', '.join(known)}")
        low, high = self.depth
        if not 0 <= low < high <= 1:
            raise ValueError(f"placement depth is {self.depth}; give two fractions with 0 <= first < last <= 1")

    def sites(self, parts: Anatomy, family: Placeable) -> tuple[Site, ...]:
        """Return the sites that this chooses for an adapter.

        Args:
            parts: Anatomy of the base.
            family: Spec of the adapter.

        Raises:
            ValueError: It chooses none; the message lists what there is.
        """
        default = ("language",) if any(t.name == "language" for t in parts.towers) else TOWERS
        towers, possible = self.towers or default, parts.of_form(*family.forms)
        kinds = family.default_kinds() if self.kinds is None else self.kinds
        chosen = tuple(s for s in possible if s.tower in towers and self._matches(s, parts, kinds))
        if not chosen:
            raise ValueError(f"{self} matches no site of this base; {self._near(parts, possible)}")
        return chosen

    def _matches(self, site: Site, parts: Anatomy, kinds: tuple[str, ...]) -> bool:
        if self.modules is not None:
            if not any(site.path == name or site.path.endswith("." + name) for name in self.modules):
                return False
        elif site.kind not in kinds and site.tower != "connector":
            return False
        if site.layer is None:
            return True
        low, high = (bound * len(parts.tower(site.tower).blocks) for bound in self.depth)
        return low - 1e-6 <= site.layer < high - 1e-6

    def _near(self, parts: Anatomy, possible: tuple[Site, ...]) -> str:
        names = sorted({site.path.rsplit(".", 1)[-1] for site in possible})
        near = [n for wanted in self.modules or () for n in difflib.get_close_matches(wanted, names, n=3)]
        found = ", ".join(f"{t.name} ({len(t.blocks)} blocks)" for t in parts.towers)
        return f"near names: {', '.join(near) or 'none'}; towers: {found}; modules: {', '.join(names) or 'none'}"
