"""The family interface: a spec a user writes, and the bank it becomes at a site."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moadapt.acting import TokenRange, ranges_of
from moadapt.adapters.delta import Delta
from moadapt.adapters.delta import Factors as Factors
from moadapt.adapters.delta import NotMergeable as NotMergeable
from moadapt.call import Call
from moadapt.names import SHARED
from moadapt.placement import Placement
from moadapt.routing import Routing
from moadapt.sites import Anatomy, Site

ROUTES = ("row", "token", "heads", "parameters")


@dataclass(frozen=True)
class Adapter:
    """One adapter of a mixture, as a bank sees it.

    Args:
        name: Its name.
        spec: What the user wrote.
        expert: Its index among the experts; None for the shared adapter.
    """

    name: str
    spec: "FamilySpec"
    expert: int | None


class Bank(nn.Module, ABC):
    """All adapters of one family at one site."""

    family: "type[FamilySpec]"
    """Class of its adapters' specs; set by the mixture."""
    acts_on: tuple[TokenRange, ...] = ()
    """Ranges of tokens beyond which its delta counts as zero; set by the mixture, which sees to it."""

    reads_output: ClassVar[bool] = False
    """Whether `forward` reads `y`, which is then the module's output before any bank's delta is added to it.

    It is the frozen module's own output unless a bank of the site `runs_module`, or modules within it are adapted.
    """
    runs_module: ClassVar[bool] = False
    """Whether `adapt` changes how the module itself runs, so that other banks get what then comes out of it.

    A site holds one such bank at most.
    """
    common: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors in `state` that all of its adapters have in common; they train until one of these is frozen.

    `load_state` replaces them for all.
    """

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor, routing: Routing | None, call: Call | None = None) -> Tensor:
        """Return what the adapters add to the base's output.

        Args:
            x: Input of the site, (B, T, D) or (N, D).
            y: The module's output there as `reads_output` says, (B, T, F) or (N, F); at an `entry`, `x` itself.
            routing: Weights of the experts; None where there are none.
            call: The forward pass of the base that this is part of; None where a bank is run by itself.

        Returns:
            The delta, shaped as `y`.
        """

    def add_to(self, y: Tensor, x: Tensor, routing: Routing | None, call: Call | None = None) -> Tensor:
        """Add the delta to a fresh output, in place where the family can.

        Args:
            y: Fresh output of the base, which the caller gives up; at an `entry`, what enters, which must stay.
            x: Input of the site.
            routing: Weights of the experts.
            call: As in `forward`.
        """
        delta: Tensor = self(x, y, routing, call)
        return y + delta

    def expert_outputs(self, x: Tensor, y: Tensor, num_experts: int, call: Call | None = None) -> Tensor:
        """Return what each expert by itself would add with weight 1, zero where it is absent; for routers that ask.

        Here the bank is run once an expert and once without any; a family may know a cheaper way.

        Args:
            x: Input of the site, (B, T, D) or (N, D).
            y: As in `forward`.
            num_experts: E.
            call: As in `forward`.

        Returns:
            (B, T, E, F) or (N, E, F).
        """
        ones = torch.eye(num_experts, device=y.device, dtype=torch.promote_types(y.dtype, torch.float32))
        without = self(x, y, Routing.constant(torch.zeros_like(ones[0])), call)
        return torch.stack([self(x, y, Routing.constant(one), call) - without for one in ones], dim=-2)

    def adapt(
        self, module: nn.Module, x: Tensor, routing: Routing | None, call: Call | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the base's module and add the delta, in one step where the family can.

        Args:
            module: The frozen module of the site.
            x: Its input.
            routing: Weights of the experts.
            call: As in `forward`.
            args: What else the module takes.
            kwargs: What else the module takes, by name.

        Returns:
            What the module returns, changed; of several outputs the first.
        """
        return with_output(module(x, *args, **kwargs), lambda y: self.add_to(y, x, routing, call))

    @abstractmethod
    def delta(self, weights: Tensor) -> Delta:
        """Return the affine map under fixed weights.

        Args:
            weights: Weight of every expert, (E,); the shared adapter counts once.

        Raises:
            NotMergeable: The family is no affine map; the message says why.
        """

    def delta_of_heads(self, routing: Routing) -> Delta:
        """Return the affine map under fixed weights that differ from head to head, or blend parameters.

        Args:
            routing: The same for all rows and tokens, (1, 1, H, E).

        Raises:
            NotMergeable: The family has none; the message says so.
        """
        raise NotMergeable(
            f"{self.family.__name__} cannot be merged under weights by head or of parameters; merge LoRAs, or use a "
            "router that gives each adapter one weight"
        )

    def check_blending(self, site: Site, num_experts: int, heads: int) -> None:
        """Refuse a router that blends the parameters of the experts here where the family cannot follow.

        Args:
            site: Where this is.
            num_experts: E.
            heads: H.

        Raises:
            ValueError: It cannot.
        """
        raise ValueError(
            f"{site.path}: the parameters of {', '.join(self.names)} cannot be blended at a site of form "
            f"{site.form!r}; choose a router that blends outputs, or give experts that are LoRAs at linear layers only"
        )

    def low_rank(self) -> Factors | None:
        """Return the adapters in low-rank form, through which gradients reach them; None where there is none."""
        return None

    @abstractmethod
    def state(self, name: str) -> dict[str, Tensor]:
        """Return an adapter's tensors by name, detached."""

    @abstractmethod
    def load_state(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy an adapter's tensors in.

        Raises:
            ValueError: Names or shapes differ; both sides are said.
        """

    @property
    def waiting(self) -> frozenset[str]:
        """Names of adapters that wait for calibration inputs to start from."""
        return frozenset()

    def start(self, inputs: Tensor) -> None:
        """Start the adapters that wait for it.

        Args:
            inputs: Mean outer product of the site's inputs, (D, D).
        """
        raise AssertionError(f"no adapter of {type(self).__name__} waits for inputs")

    @abstractmethod
    def grow(self, adapter: Adapter) -> None:
        """Add one adapter; the old ones keep their bits. Only between fits."""

    @abstractmethod
    def trim(self, keep: Sequence[str]) -> None:
        """Keep the shared adapter and these experts, renumbered in this order. Only between fits."""

    @abstractmethod
    def freeze(self, name: str) -> None:
        """Move an adapter to the frozen stack, where no optimiser reaches it. Only between fits."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the adapters here."""

    @property
    def has_experts(self) -> bool:
        """Whether the router weighs any adapter here; every forward pass asks, so families know it at once."""
        return any(name != SHARED for name in self.names)

    @property
    @abstractmethod
    def frozen(self) -> frozenset[str]:
        """Names of the adapters that no optimiser reaches."""

    @abstractmethod
    def expert_rows(self) -> dict[str, Tensor]:
        """Return, for each trained parameter that stacks experts, the expert of every row, (R,)."""

    def rates(self) -> dict[str, float]:
        """Return the factor of the learning rate of each parameter that has one, by name."""
        return {}

    def undecayed(self) -> frozenset[str]:
        """Return the names of parameters that weight decay must leave alone, such as gates and biases."""
        return frozenset()

    def readings(self) -> dict[str, float]:
        """Return numbers worth a line in a training's log, such as how far gates are open, by name."""
        return {}


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


def with_output(outputs: Any, change: Any) -> Any:
    """Return a module's outputs with the first one changed.

    Args:
        outputs: A tensor, or a tuple that begins with one.
        change: Takes and returns that tensor.
    """
    if isinstance(outputs, Tensor):
        return change(outputs)
    first, *others = cast(tuple[Any, ...], outputs)
    return (change(first), *others)
