"""The family interface: what a user writes, and what routings the bank that it becomes can follow."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from moadapt.acting import TokenRange, ranges_of
from moadapt.adapters.bank import Adapter, Bank
from moadapt.placement import Placement
from moadapt.routing import Routing
from moadapt.sites import Anatomy, Site

ROUTES = ("row", "token", "heads", "parameters")


@dataclass(frozen=True, kw_only=True)
class FamilySpec(ABC):
    """What a user writes to choose a family: a value bound by YAML and saved as JSON.

    Args:
        placement: Where the adapter sits; None is the mixture's placement.
        acts_on: Tokens that it changes: `image` tokens, `text` (all others), the `question` (text of the prompt), the
            `answer` (what stands behind it), or those of `rows_with_image` or `rows_without_image`; of several ranges
            what is within all. Others it leaves exactly as they are. Such an adapter cannot be merged.
    """

    placement: Placement | None = None
    acts_on: TokenRange | tuple[TokenRange, ...] = "all"

    forms: ClassVar[tuple[str, ...]] = ("linear",)
    """Forms of site that it can sit at, see `moadapt.sites.Site`."""
    routes: ClassVar[frozenset[str]] = frozenset(ROUTES)
    """What routings it takes beside constant ones: weights by row, by token, by heads, of blended parameters."""
    mergeable: ClassVar[bool] = True
    """Whether `Bank.delta` exists."""
    identity: ClassVar[bool] = True
    """Whether a fresh adapter changes nothing."""
    reads_prompt: ClassVar[bool] = False
    """Whether tokens may read later tokens of the prompt, so that no answer may lie in it."""
    causal: ClassVar[bool] = True
    """Whether tokens read no later ones outside the prompt; if they do, it sits only where attention is not causal."""

    cross_modal: ClassVar[bool] = False
    """Whether modalities read each other through it, which trains best at rates of its own."""

    standalone: ClassVar[bool] = True
    """Whether what it adds follows from a site's input and output, so that a bank can be run by itself.

    If not, its delta cannot be taken off some of the tokens.
    """

    def default_kinds(self) -> tuple[str, ...]:
        """Return the kinds of site that it sits at where its placement names none."""
        return ("attention", "mlp")

    def sites(self, found: Anatomy, default: Placement) -> tuple[Site, ...]:
        """Return the sites where it sits.

        Args:
            found: Anatomy of the base.
            default: Placement of specs that have none of their own.

        Raises:
            ValueError: There are none; the message lists what there is.
        """
        return (self.placement or default).sites(found, self)

    def check_base(self, base: PreTrainedModel, parts: Anatomy) -> None:  # noqa: B027, most families need nothing
        """Refuse a base that the family is not made for.

        Args:
            base: The base.
            parts: Its anatomy.

        Raises:
            ValueError: The base lacks what the adapters need; the message says what.
        """

    def by_default(self, site: Site) -> bool:
        """Tell whether it sits at a site where its placement names neither kinds nor modules."""
        return site.kind in self.default_kinds()

    def lacks(self, site: Site) -> str | None:
        """Say why it cannot sit at a site of its forms; None where it can. Placements leave such sites out."""
        if self.causal or not site.causal:
            return None
        return (
            "attention is causal there, or does not say that it is not, and tokens would read later ones through "
            f"{type(self).__name__}; place it where attention goes both ways, such as Placement(towers=('vision',))"
        )

    def inserts(self) -> int:
        """Return how many tokens it puts before each row's first real one, for a bank at the entry to fill."""
        return 0

    def shares_with(self) -> Hashable:
        """Return what adapters of this family must have in common to be stacked in one bank."""
        return None

    @property
    def ranges(self) -> tuple[TokenRange, ...]:
        """The ranges of tokens that limit it, in one order; none where it acts on all tokens."""
        return ranges_of(self.acts_on)

    @classmethod
    @abstractmethod
    def bank(cls, site: Site, adapters: Sequence[Adapter], module: nn.Module) -> Bank:
        """Build the bank of a site.

        Args:
            site: Where.
            adapters: The adapters of this family there, the shared one first.
            module: The frozen module there.
        """

    @classmethod
    def banks(cls, sites: Mapping[Site, tuple[Sequence[Adapter], nn.Module]]) -> dict[Site, Bank]:
        """Build the banks of all sites; a family whose sites share tensors does it in one go.

        Args:
            sites: For each site the adapters of this family there and the frozen module.
        """
        return {site: cls.bank(site, adapters, module) for site, (adapters, module) in sites.items()}

    @classmethod
    def grow(cls, banks: Mapping[Site, Bank], adapter: Adapter) -> None:
        """Add one adapter to the banks of all its sites; a family whose sites share tensors does it in one go.

        Args:
            banks: The bank of this family at each of them.
            adapter: What to add; only between fits.
        """
        for bank in banks.values():
            bank.grow(adapter)


def check_routing(family: type[FamilySpec], site: Site, routing: Routing | None) -> None:
    """Refuse a routing that a family cannot follow.

    Args:
        family: Class of the adapters' specs.
        site: Where.
        routing: Weights of the experts.

    Raises:
        ValueError: The family takes no weights of this kind.
    """
    if routing is None or family.routes.issuperset(ROUTES):
        return
    asked = {
        "row": routing.per_row,
        "token": routing.per_token,
        "heads": routing.weights.shape[2] > 1,
        "parameters": routing.combines == "parameters",
    }
    refused = [name for name, is_asked in asked.items() if is_asked and name not in family.routes]
    if refused:
        raise ValueError(
            f"{site.path}: {family.__name__} cannot be weighed by {refused[0]}; it takes constant weights"
            f"{''.join(f', by {name}' for name in ROUTES if name in family.routes)}; choose another router or family"
        )
