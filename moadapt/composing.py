"""Mixtures from adapters that were trained apart, and other routers for the adapters of a mixture.

Every adapter keeps its own sites, ranks and scales; the tensors of mixtures come over bit for bit, those of foreign
LoRAs as far as one scale for all sites allows. What is new is the router.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from moadapt.adapters.family import FamilySpec
from moadapt.adapters.initial import filled_later
from moadapt.attaching import refuse_attached
from moadapt.context import routers_of
from moadapt.hub.reading import read_adapter
from moadapt.mixture import Mixture
from moadapt.mixture_spec import MixtureSpec
from moadapt.names import SHARED
from moadapt.placement import Placement
from moadapt.places import plan_places
from moadapt.router import RouterSpec
from moadapt.storage import fill, is_mixture, read, tensors


@dataclass(frozen=True)
class Found:
    """One adapter, of a saved mixture or a foreign one.

    Args:
        spec: What the user wrote, with the placement that it had.
        tensors: By site and part.
        frozen: Whether no optimiser reached it.
        owned: Paths of modules that it has whole.
    """

    spec: FamilySpec
    tensors: Mapping[str, Tensor]
    frozen: bool
    owned: frozenset[str] = frozenset()


def compose(
    base: PreTrainedModel,
    experts: Mapping[str, str | Path],
    *,
    router: RouterSpec,
    shared: str | Path | None = None,
    frozen: bool = False,
    dropout: float | None = None,
    initial: Mapping[str, str | Path] | None = None,
) -> Mixture:
    """Put adapters that were trained apart behind one router.

    Args:
        base: The base that all of them were trained on.
        experts: By the name that each shall have: the folder of a mixture of one adapter, or `folder:name` for one of
            several, where `folder:shared` is the shared one; or a LoRA as the peft library writes it, by folder or hub
            name.
        router: Gives the experts their weights.
        shared: The adapter that every input uses, named likewise.
        frozen: Whether to freeze all of them, and not only those that were frozen in their folder.
        dropout: Of all adapters that have one, since LoRAs of one site share a mask; None is each one's own.
        initial: By name, the folders of foreign adapters as they were before training, where their base was changed
            then in a way that cannot be computed again.

    Raises:
        ValueError: A folder is no mixture of this base and no LoRA that fits it, a reference names no adapter or
            several, two adapters have the same module whole, a name is unsafe, or the base carries a mixture already.
    """
    refuse_attached(base)
    named = {**experts} if shared is None else {SHARED: shared, **experts}
    if SHARED in experts:
        raise ValueError(f"an expert cannot be called {SHARED!r}; pass that adapter as shared=, or name it otherwise")
    found = find_adapters(base, named, dropout=dropout, initial=initial)
    spec = MixtureSpec(
        experts={name: found[name].spec for name in experts},
        shared=None if shared is None else found[SHARED].spec,
        router=router,
        placement=Placement(),
    )
    return build_filled(
        base, spec, stored_names(found), [name for name, each in found.items() if frozen or each.frozen]
    )


def find_adapters(
    base: PreTrainedModel,
    named: Mapping[str, str | Path],
    *,
    dropout: float | None,
    initial: Mapping[str, str | Path] | None,
) -> dict[str, Found]:
    """Read adapters, of mixtures or foreign ones, by the names that they shall have.

    Args:
        base: Without a mixture on it.
        named: As in `compose`.
        dropout: As in `compose`.
        initial: As in `compose`.

    Raises:
        ValueError: As in `compose`.
    """
    before = dict(initial or {})
    if stray := before.keys() - named.keys():
        raise ValueError(f"initial names {', '.join(sorted(stray))}; the adapters are {', '.join(named)}")
    found = {name: _find(str(reference), base, before.get(name)) for name, reference in named.items()}
    _refuse_two_owners(found)
    return {name: replace(each, spec=_with_dropout(each.spec, dropout)) for name, each in found.items()}


def stored_names(found: Mapping[str, Found]) -> dict[str, Tensor]:
    """Return the tensors of adapters under the names that a saved mixture gives them.

    Args:
        found: Adapters by name.
    """
    return {f"adapters/{name}/{rest}": t for name, each in found.items() for rest, t in each.tensors.items()}


def reroute(mixture: Mixture, router: RouterSpec) -> Mixture:
    """Put the adapters of a mixture behind another router.

    Args:
        mixture: Whose adapters; it is detached from its base once nothing can go wrong.
        router: Gives the experts their weights from now on. It starts afresh; one that wraps the router before, such as
            `abstain`, goes on with it.

    Returns:
        A new mixture on the same base; adapters have the same bits, and those that were frozen still are.

    Raises:
        ValueError: The mixture was detached or has no experts, or the router fits neither it nor its base.
    """
    if not mixture.attached:
        raise ValueError("this mixture was detached from its base; attach adapters again, or load them")
    spec = replace(mixture.spec, router=router)
    routed = [site for site, here in mixture.sites.items() if any(a.expert is not None for a in here)]
    with mixture.bare_base() as base:
        for place in plan_places(base, mixture.anatomy, routed, router):
            router.build(place.dim, len(mixture.experts))
    fresh = succeed(mixture, spec, adapter_tensors(mixture), mixture.frozen)
    if router.inner == mixture.spec.router:
        for old, new in zip(routers_of(mixture.routers), routers_of(fresh.routers), strict=True):
            new.adopt(old)
    return fresh


def succeed(mixture: Mixture, spec: MixtureSpec, stored: Mapping[str, Tensor], frozen: Iterable[str]) -> Mixture:
    """Build the mixture that comes after another one on its base, in the same mode.

    Args:
        mixture: The one before, which is detached.
        spec: As in `build_filled`.
        stored: As in `build_filled`.
        frozen: As in `build_filled`.
    """
    training, checkpoints = mixture.training, mixture.checkpoints
    fresh = build_filled(mixture.detach(), spec, stored, frozen)
    if checkpoints:
        fresh.gradient_checkpointing_enable()
    return fresh.train(training)


def build_filled(
    base: PreTrainedModel, spec: MixtureSpec, stored: Mapping[str, Tensor], frozen: Iterable[str]
) -> Mixture:
    """Build a mixture whose adapters are known and whose routers are fresh.

    Args:
        base: A bare base.
        spec: What to attach.
        stored: Tensors of the adapters, by stored name.
        frozen: Names of adapters that no optimiser reaches.

    Raises:
        ValueError: The tensors are not those of the adapters.
    """
    with filled_later():
        mixture = Mixture(base, spec)
    try:
        own = {name: tensor for name, tensor in tensors(mixture).items() if name.startswith("routers/")}
        fill(mixture, {**own, **stored})
    except ValueError:
        mixture.detach()
        raise
    for name in frozen:
        mixture.freeze(name)
    return mixture


def _find(reference: str, base: PreTrainedModel, initial: str | Path | None) -> Found:
    """Read an adapter of a mixture, or a foreign one."""
    folder, name = _parsed(reference)
    if name is None and not is_mixture(folder):
        foreign = read_adapter(reference, base, initial=initial)
        return Found(foreign.spec, foreign.tensors, frozen=False, owned=foreign.owned)
    if initial is not None:
        raise ValueError(f"{reference} is an adapter of a mixture, which changed no base; leave its initial out")
    stored = read(folder, base)
    adapters = {adapter.name: adapter.spec for adapter in stored.spec.adapters()}
    if name is None and len(adapters) > 1:
        raise ValueError(
            f"{reference} holds {len(adapters)} adapters; name the one to take: "
            f"{', '.join(f'{reference}:{each}' for each in adapters)}"
        )
    name = next(iter(adapters)) if name is None else name
    if name not in adapters:
        raise ValueError(f"{folder} holds no adapter {name!r}; it holds {', '.join(adapters)}")
    spec, prefix = adapters[name], f"adapters/{name}/"
    placed = replace(spec, placement=spec.placement or stored.spec.placement)
    own = {n.removeprefix(prefix): t for n, t in stored.tensors.items() if n.startswith(prefix)}
    return Found(placed, own, name in stored.frozen)


def _parsed(reference: str) -> tuple[Path, str | None]:
    """Split `folder:name`; a folder whose own path holds a colon is one all the same."""
    folder, colon, name = reference.rpartition(":")
    if Path(reference).is_dir() or not colon:
        return Path(reference), None
    return Path(folder), name


def _refuse_two_owners(found: Mapping[str, Found]) -> None:
    """Refuse adapters that have the same module whole: their changes of it would add up to neither's."""
    owners: dict[str, str] = {}
    for name, each in found.items():
        for path in each.owned:
            if path in owners:
                raise ValueError(
                    f"{owners[path]} and {name} both have {path} whole (modules_to_save), which can have one owner; "
                    "compose one of them only"
                )
            owners[path] = name


def _with_dropout(spec: FamilySpec, dropout: float | None) -> FamilySpec:
    known = {field.name for field in fields(spec)}
    return spec if dropout is None or "dropout" not in known else replace(spec, dropout=dropout)  # type: ignore[call-arg]


def adapter_tensors(mixture: Mixture) -> dict[str, Tensor]:
    """Return the tensors of a mixture's adapters under the names that they are saved by.

    Args:
        mixture: Whose adapters.
    """
    return {name: tensor for name, tensor in tensors(mixture).items() if name.startswith("adapters/")}
