"""Adapters that come into a mixture and leave it, while the others keep their bits.

What a trained router knows of the experts that stay is kept: it grows by what is new, or loses what is gone. A fitted
one has seen other adapters than there are now, and waits to be fitted again.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from moadapt.adapters.lora import LoRA
from moadapt.composing import Found, adapter_tensors, build_filled, find_adapters, stored_names, succeed
from moadapt.context import routers_of
from moadapt.mixture import Mixture
from moadapt.mixture_spec import MixtureSpec
from moadapt.names import SHARED
from moadapt.router import Router, RouterSpec


def add_adapters(
    mixture: Mixture,
    experts: Mapping[str, str | Path],
    *,
    router: RouterSpec | None = None,
    frozen: bool = False,
    dropout: float | None = None,
    initial: Mapping[str, str | Path] | None = None,
) -> Mixture:
    """Add experts to a mixture, behind those that it has.

    Args:
        mixture: Detached from its base once nothing can go wrong.
        experts: Folders or hub names by new names, as `compose` takes them.
        router: Gives all experts their weights from now on, and starts afresh; None keeps the one before, which a new
            expert starts at as `Router.grow` says, and which is fitted again where it is fitted.
        frozen: Whether to freeze the new ones.
        dropout: Of the new ones.
        initial: As `compose` takes it.

    Returns:
        A new mixture on the same base, in the same mode; the adapters from before have the same bits, and those that
        were frozen still are.

    Raises:
        ValueError: An adapter is refused or bears a name that is taken, the router takes no such number of experts, or
            the mixture was detached.
    """
    _refuse_detached(mixture)
    before = mixture.spec
    taken = [name for name in experts if name in before.experts or name == SHARED]
    if taken or not experts:
        raise ValueError(
            f"new experts are called {', '.join(experts) or 'nothing'}; taken: {', '.join(taken) or 'none'}"
        )
    with mixture.bare_base() as base:
        found = find_adapters(base, experts, dropout=dropout, initial=initial)
    _refuse_owners(mixture, found)
    spec = replace(
        before,
        experts={**before.experts, **{name: each.spec for name, each in found.items()}},
        router=before.router if router is None else router,
    )
    stored = {**adapter_tensors(mixture), **stored_names(found)}
    new_frozen = [*mixture.frozen, *(name for name, each in found.items() if frozen or each.frozen)]
    old = _learned(mixture, router, lambda each: each.grow(len(found)))
    return _changed(mixture, spec, stored, new_frozen, old)


def remove_adapters(mixture: Mixture, names: Sequence[str], *, router: RouterSpec | None = None) -> Mixture:
    """Take experts out of a mixture.

    Args:
        mixture: As in `add_adapters`.
        names: Of the experts to leave out; one at least stays.
        router: As in `add_adapters`.

    Returns:
        As in `add_adapters`.

    Raises:
        ValueError: There is no such expert, none would be left, or as in `add_adapters`.
    """
    _refuse_detached(mixture)
    before = mixture.spec
    unknown = [name for name in names if name not in before.experts]
    kept = [name for name in before.experts if name not in names]
    if unknown or not kept or not names:
        raise ValueError(
            f"cannot remove {', '.join(names) or 'nothing'} from the experts {', '.join(before.experts)}; name some of "
            "these, and leave at least one"
        )
    spec = replace(
        before,
        experts={name: before.experts[name] for name in kept},
        router=before.router if router is None else router,
    )
    gone = tuple(f"adapters/{name}/" for name in names)
    stored = {name: t for name, t in adapter_tensors(mixture).items() if not name.startswith(gone)}
    indices = [mixture.experts.index(name) for name in kept]
    old = _learned(mixture, router, lambda each: each.trim(indices))
    return _changed(mixture, spec, stored, [name for name in mixture.frozen if name not in names], old)


def _refuse_detached(mixture: Mixture) -> None:
    if not mixture.attached:
        raise ValueError("this mixture was detached from its base; attach adapters again, or load them")


def _refuse_owners(mixture: Mixture, found: Mapping[str, Found]) -> None:
    """Refuse an adapter that has a module whole which one of the mixture has whole already."""
    for site, here in mixture.sites.items():
        for adapter in here:
            whole = isinstance(adapter.spec, LoRA) and adapter.spec.rank_at(site) >= min(
                site.in_features, site.out_features
            )
            for name, each in found.items():
                if whole and site.path in each.owned:
                    raise ValueError(
                        f"{adapter.name} and {name} both have {site.path} whole (modules_to_save), which can have one "
                        "owner; remove one of them"
                    )


def _learned(
    mixture: Mixture, router: RouterSpec | None, change: Callable[[Router], None]
) -> dict[str, dict[str, Tensor]]:
    """Return what routers know once they are changed, by place; nothing where another router comes."""
    if router is not None:
        return {}
    found = {}
    for place, old in zip(mixture.places, routers_of(mixture.routers), strict=True):
        changed = copy.deepcopy(old)
        change(changed)
        found[place.name] = changed.state_dict()
    return found


def _changed(
    mixture: Mixture,
    spec: MixtureSpec,
    stored: Mapping[str, Tensor],
    frozen: Iterable[str],
    learned: Mapping[str, Mapping[str, Tensor]],
) -> Mixture:
    """Build the mixture that comes after; the one before stays on its base where that is impossible."""
    with mixture.bare_base() as base:
        build_filled(base, spec, stored, ()).detach()
    fresh = succeed(mixture, spec, stored, frozen)
    for place, new in zip(fresh.places, routers_of(fresh.routers), strict=True):
        if place.name in learned:
            state = learned[place.name]
            new.make_room(state)
            new.load_state_dict(state)
    return fresh
