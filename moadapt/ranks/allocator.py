"""The interface of rank allocators: a spec that sets ranks before a fit, and may drive them while it runs."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from moadapt.adapters.bank import Bank
from moadapt.adapters.family import FamilySpec
from moadapt.adapters.lora import LoRA
from moadapt.adapters.lora_bank import LoRABank
from moadapt.mixture_spec import MixtureSpec
from moadapt.sites import Anatomy, Site

NOTHING_READ: Mapping[Site, Tensor] = MappingProxyType({})


class RankDriver(ABC):
    """Changes ranks while a fit runs, by masks only: no parameter is replaced.

    All that it does follows from the gradients that the processes agreed on, so that ranks agree too.
    """

    @abstractmethod
    def observe(self) -> None:
        """Look at the gradients of a step, reduced over processes, before the optimiser takes it."""

    @abstractmethod
    def act(self) -> None:
        """Mask what is not kept, after the optimiser took the step, or skipped one that `observe` did not see."""

    def finish(self) -> None:
        """Mask what the end of the fit leaves out, where it stopped before all steps were taken; by default nothing."""
        return

    @abstractmethod
    def readings(self) -> dict[str, float]:
        """Return numbers worth a line in a training's log, by name."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs, tensors and plain values."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned.

        Raises:
            ValueError: It belongs to other adapters.
        """


@dataclass(frozen=True, kw_only=True)
class RankAllocator(ABC):  # noqa: B024, command lines take subclasses of abstract classes only
    """What a user writes to choose how ranks are found."""

    prunes: ClassVar[bool] = False
    """Whether a fit leaves terms that add nothing, to be trimmed when it ends."""

    def reads(self, spec: MixtureSpec, found: Anatomy) -> tuple[Site, ...]:
        """Return the sites whose inputs `plan` has to know, linear layers; by default none.

        Args:
            spec: What the user chose.
            found: Anatomy of the base.
        """
        return ()

    def plan(self, spec: MixtureSpec, found: Anatomy, means: Mapping[Site, Tensor] = NOTHING_READ) -> MixtureSpec:
        """Return the spec with the ranks that a fit starts with; by default those that it has.

        Args:
            spec: What the user chose.
            found: Anatomy of the base.
            means: Mean outer products of the inputs of the sites that `reads` names, (D, D), see
                `moadapt.input_means`.
        """
        return spec

    def driver(self, banks: Iterable[tuple[Site, Bank]], steps: float) -> RankDriver | None:
        """Return what changes ranks while a fit runs; by default nothing does.

        Args:
            banks: Those of the mixture.
            steps: How many steps of the optimiser there will be; may be infinite.
        """
        return None


def with_ranks(spec: MixtureSpec, ranks: Mapping[str, Mapping[str, int]]) -> MixtureSpec:
    """Return a spec whose LoRAs have these ranks.

    Args:
        spec: Any.
        ranks: By adapter the rank at every site, by path; adapters that are not named stay as they are.
    """

    def changed(name: str, family: FamilySpec) -> FamilySpec:
        if name not in ranks:
            return family
        assert isinstance(family, LoRA), "only LoRAs have ranks"
        return replace(family, ranks={path: rank for path, rank in ranks[name].items() if rank != family.rank} or None)

    named = {adapter.name: (adapter, changed(adapter.name, adapter.spec)) for adapter in spec.adapters()}
    shared = next((new for adapter, new in named.values() if adapter.expert is None), None)
    return replace(spec, shared=shared, experts={name: named[name][1] for name in spec.experts})


def ranks_of(spec: MixtureSpec, found: Anatomy) -> dict[str, dict[Site, int]]:
    """Return the rank of every LoRA at every site of its placement, 0 where it is absent.

    Args:
        spec: Of a mixture.
        found: Anatomy of the base.
    """
    loras = {adapter.name: adapter.spec for adapter in spec.adapters() if isinstance(adapter.spec, LoRA)}
    return {
        name: {site: lora.rank_at(site) for site in (lora.placement or spec.placement).sites(found, lora)}
        for name, lora in loras.items()
    }


def stored_ranks(spec: MixtureSpec, found: Anatomy, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """Return the rank that every LoRA has in stored tensors, by path; sites that are not stored keep theirs.

    Args:
        spec: Of a mixture with the same adapters.
        found: Anatomy of the base.
        tensors: By the names of `moadapt.storage.tensors`.
    """

    def stored(name: str, site: Site, rank: int) -> int:
        down = tensors.get(f"adapters/{name}/{site.path}/down")
        return rank if down is None else len(down)

    ranks = ranks_of(spec, found)
    return {name: {site.path: stored(name, site, rank) for site, rank in own.items()} for name, own in ranks.items()}


def lora_banks(banks: Iterable[tuple[Site, Bank]]) -> Iterator[tuple[Site, LoRABank]]:
    """Iterate over the banks of LoRAs whose terms add nothing where `up` is zero.

    Those whose start is taken off, such as PiSSA, are left out: there a zero `up` takes the start off the base.
    """
    return ((site, bank) for site, bank in banks if isinstance(bank, LoRABank) and bank.tensors == ("down", "up"))


def cost_of(site: Site) -> int:
    """Return how many parameters one rank is worth at a site, D + F."""
    return site.in_features + site.out_features


def highest(scores: Tensor, costs: Tensor, budget: int) -> Tensor:
    """Choose terms by score per cost until the budget is spent; ties go to the first.

    Args:
        scores: (N,).
        costs: (N,), integers.
        budget: Never exceeded; a term that it cannot pay for is passed over.

    Returns:
        Which are kept, (N,).
    """
    order = torch.sort(scores / costs, descending=True, stable=True).indices.tolist()
    kept, left, prices = torch.zeros(len(scores), dtype=torch.bool), budget, costs.tolist()
    for index in order:
        if prices[index] <= left:
            kept[index] = True
            left -= prices[index]
    return kept
