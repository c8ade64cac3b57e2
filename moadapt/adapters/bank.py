"""The bank: all adapters of one family at one site, what it adds there and how it is stored, grown and merged."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from moadapt.acting import TokenRange
from moadapt.adapters.delta import Delta, Factors, NotMergeable
from moadapt.call import Call
from moadapt.names import SHARED
from moadapt.routing import Routing
from moadapt.sites import Site

if TYPE_CHECKING:
    from moadapt.adapters.family import FamilySpec


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
