"""What to tell about a placement that chooses nothing, or more than was meant."""

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from moadapt.sites import Anatomy, Site

_GLOB = set("*?[]^$|\\")


def ambiguity(name: str, found: Sequence[Site]) -> str:
    """Return the message about a module name that several towers have.

    Args:
        name: As given.
        found: Sites of that name.
    """
    counts = Counter(site.tower for site in found)
    told = " and ".join(f"the {tower} tower ({count} times)" for tower, count in sorted(counts.items()))
    choices = " or ".join(f'("{tower}",)' for tower in sorted(counts))
    both = ", ".join(f'"{tower}"' for tower in sorted(counts))
    return f"module {name!r} is found in {told}; write towers={choices}, ({both}) for all of them, or whole paths"


def told(spec: Any) -> str:
    """Return a spec as it would be written, without what is by default.

    Args:
        spec: A dataclass.
    """
    defaults = {f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(spec)}
    given = {name: value for name, default in defaults.items() if (value := getattr(spec, name)) != default}
    values = {name: told(value) if is_dataclass(value) else repr(value) for name, value in given.items()}
    return f"{type(spec).__name__}({', '.join(f'{name}={value}' for name, value in values.items())})"


def misplacement(modules: Sequence[str] | None, kinds: Sequence[str] | None, parts: Anatomy, family: Any) -> str:
    """Return why a placement may have found nothing, and what there is.

    Args:
        modules: Names or paths that were asked for; None where kinds were.
        kinds: Kinds of site that were asked for; None for those of the family.
        parts: Anatomy of the base.
        family: Spec of the adapter.
    """
    possible = parts.of_form(*family.forms)
    names = sorted({_leaf(site) for site in possible})
    near = [n for wanted in modules or () for n in difflib.get_close_matches(wanted.rsplit(".", 1)[-1], names, n=3)]
    towers = ", ".join(f"{t.name} ({len(t.blocks)} blocks)" for t in parts.towers)
    hints = [hint for name in modules or () if (hint := _hint(name, parts, possible, family))]
    hints += [hint for kind in kinds or () if not modules and (hint := _hint_of_kind(kind, parts, possible, family))]
    if kinds == ():
        hints.append("kinds is empty")
    if not possible:
        hints.append(_formless(parts, family))
    if not modules and (unread := parts.of_form(*family.forms, unread=True)[len(possible) :]):
        blocks = sorted({f"{site.tower} block {site.layer}" for site in unread if site.layer is not None})
        hints.append(f"never read, and skipped unless unread=True: {', '.join(blocks) or len(unread)}")
    near_names = f"near names: {', '.join(dict.fromkeys(near)) or 'none'}"
    return "; ".join([*hints, near_names, f"towers: {towers}", f"modules: {', '.join(names) or 'none'}"])


def _hint(name: str, parts: Anatomy, possible: Iterable[Site], family: Any) -> str | None:
    """Say what a name that matched nothing is, if that can be told."""
    if _GLOB & set(name):
        return f"{name!r} is compared as it stands, * and other patterns mean nothing in it: give plain last parts"
    if any(_is_called(site, name) for site in possible):
        return f"{name!r} exists, but not in these towers or at this depth"
    every = (*parts.sites, *parts.unread)
    if any(_is_called(site, name) and site.form in family.forms for site in parts.unread):
        return f"{name!r} is never read by this base, and skipped unless unread=True"
    forms = sorted({site.form for site in every if _is_called(site, name) and site.form not in family.forms})
    leaves = sorted({_leaf(site) for site in possible if f".{name}." in f".{site.path}"})
    if leaves:
        return f"{name!r} is a container; name what it holds: {', '.join(leaves)}"
    if forms:
        return f"{name!r} has the form {' and '.join(forms)}, but {_needs(family)}"
    return None


def _hint_of_kind(kind: str, parts: Anatomy, possible: Iterable[Site], family: Any) -> str | None:
    """Say why a kind of site was not chosen, if that can be told."""
    forms = sorted({site.form for site in (*parts.sites, *parts.unread) if site.kind == kind})
    if not forms:
        return f"this base has no sites of kind {kind!r}"
    if not any(site.kind == kind for site in possible):
        return f"sites of kind {kind!r} have the form {' and '.join(forms)}, but {_needs(family)}"
    return None


def _formless(parts: Anatomy, family: Any) -> str:
    forms = sorted({site.form for site in parts.sites})
    return f"{_needs(family)}, and this base has only sites of the forms {', '.join(forms) or 'none'}"


def _needs(family: Any) -> str:
    return f"{type(family).__name__} sits at sites of the form {' or '.join(family.forms)}"


def _is_called(site: Site, name: str) -> bool:
    return site.path == name or site.path.endswith("." + name)


def _leaf(site: Site) -> str:
    return site.path.rsplit(".", 1)[-1]
