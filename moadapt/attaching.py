"""The two ways to a mixture: attach fresh adapters to a base, or load trained ones."""

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from moadapt.adapted import AdaptedModule
from moadapt.adapters.family import FamilySpec
from moadapt.mixture import Mixture
from moadapt.mixture_spec import MixtureSpec
from moadapt.placement import Placement
from moadapt.router import RouterSpec
from moadapt.storage import load as load_folder


def attach(
    base: PreTrainedModel,
    *,
    shared: FamilySpec | None = None,
    experts: Mapping[str, FamilySpec] | None = None,
    router: RouterSpec | None = None,
    placement: Placement | None = None,
) -> Mixture:
    """Put adapters and routers on a base.

    Args:
        base: Any transformers model; it is frozen.
        shared: The adapter that every input uses.
        experts: Adapters that the router weighs, by name.
        router: Gives the experts their weights; needed exactly when there are experts.
        placement: Where adapters sit that name no placement of their own; by default all attention and MLP linears of
            the language tower.

    Raises:
        ValueError: A name is unsafe, nothing is to be attached, the router is missing or too many, or the base
            carries a mixture already.
    """
    spec = MixtureSpec(dict(experts or {}), shared, router, placement or Placement())
    refuse_attached(base)
    return Mixture(base, spec)


def load(folder: str | Path, base: PreTrainedModel) -> Mixture:
    """Read a saved mixture onto its base.

    Args:
        folder: What `Mixture.save` wrote.
        base: The same base; its structure and weights are compared with the stored fingerprint.

    Raises:
        ValueError: The folder is no mixture, its schema is unknown, or the base is another one.
    """
    refuse_attached(base)
    return load_folder(Path(folder), base)


def refuse_attached(base: PreTrainedModel) -> None:
    """Refuse a base that carries a mixture.

    Raises:
        ValueError: It does; the first site is named.
    """
    taken = next((path for path, module in base.named_modules() if isinstance(module, AdaptedModule)), None)
    if taken is not None:
        raise ValueError(f"the base carries a mixture already (at {taken}); detach that one first")
