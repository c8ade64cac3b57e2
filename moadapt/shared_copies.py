"""The shared adapter once a task: in one backward pass the gradients of its copies are its gradients task by task.

The copies have the very values of the adapter itself and every row uses that of its task with weight 1, as experts by
task are used, so outputs stay what they are to rounding. Copies are expanded from the parameter, which so gets the sum
of their gradients, as it would without them. What this costs is rank, or width, and not another pass of the base.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from moadapt.adapters.bank import Bank
from moadapt.adapters.stacked import StackedBank
from moadapt.call import Call
from moadapt.names import SHARED
from moadapt.reaching import reach
from moadapt.routing import Routing
from moadapt.sites import Site


@dataclass(frozen=True)
class Twin:
    """A bank, and what stands in its place while its shared adapter is there once a task.

    Args:
        own: The bank.
        bank: The same with copies of the shared adapter behind the experts.
        num_experts: How many experts stand before the copies.
    """

    own: StackedBank
    bank: StackedBank
    num_experts: int


@dataclass(frozen=True)
class Copied:
    """Which copy of the shared adapter each row of a pass uses.

    Args:
        twins: By path of the site.
        routing: Of the copies, by row.
        reads_images: Whether some of these sites get images by themselves.
    """

    twins: Mapping[str, Twin]
    routing: Routing
    reads_images: bool

    def of(self, bank: Bank, routing: Routing | None, site: Site, x: Tensor, call: Call) -> tuple[Bank, Routing] | None:
        """Return what stands in the place of a bank, and its routing; None where the bank itself does.

        Args:
            bank: At the site.
            routing: Weights of the experts there; None where none are weighed.
            site: Where.
            x: Its input.
            call: The current call.

        Raises:
            ValueError: How the input belongs to rows cannot be told.
        """
        twin = self.twins.get(site.path)
        if twin is None or twin.own is not bank:
            return None
        try:
            own = reach(call, site, "the tasks of the rows", self.routing, x, by_sequence=True)
        except ValueError as error:
            raise ValueError(
                f"the gradients of the shared adapter cannot be told task by task: {error}. Or choose a balance method "
                "that reads no gradients"
            ) from error
        none = Routing(own.weights[..., :0], twin.num_experts, None if own.indices is None else own.indices[..., :0])
        return twin.bank, (none if routing is None else routing).followed_by(own)


class SharedCopies:
    """The banks of a mixture with the shared adapter in them once a task.

    Args:
        banks: Of the mixture, with their sites.
        num_experts: How many experts the mixture has.
        count: How many tasks there are, 1 or more.
        blends: Whether the router blends the parameters of the experts.
        reads_images: Whether some site of the shared adapter gets images by themselves.

    Raises:
        ValueError: There is no shared adapter that is trained, or it is of a family that cannot stand in a bank more
            than once.
    """

    def __init__(
        self,
        banks: Iterable[tuple[Site, Bank]],
        num_experts: int,
        count: int,
        *,
        blends: bool,
        reads_images: bool,
    ) -> None:
        held = {site.path: bank for site, bank in banks if SHARED in bank.names and SHARED not in bank.frozen}
        if not held:
            raise ValueError("gradients task by task are those of the shared adapter, and none is trained; give one")
        self.count, self._reads_images = count, reads_images
        self._twins = {path: _twin(path, bank, num_experts, count, blends=blends) for path, bank in held.items()}

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained of the shared adapter, in the order of the sites."""
        return [p for twin in self._twins.values() for p in twin.own.shared_parameters().values() if p.requires_grad]

    def take(self) -> dict[nn.Parameter, Tensor]:
        """Copy what the shared adapter is now, for the passes until the next call of this.

        Returns:
            For each of its parameters the copies, (tasks, ...), through which gradients reach it.
        """
        found: dict[nn.Parameter, Tensor] = {}
        for twin in self._twins.values():
            own = twin.own.shared_parameters()
            copies = {name: parameter.expand(self.count, *parameter.shape) for name, parameter in own.items()}
            twin.bank.take(twin.own, copies)
            found |= {own[name]: copied for name, copied in copies.items() if own[name].requires_grad}
        return found

    def used_by(self, rows: Tensor) -> Copied:
        """Return what lets each row use the copy of its task.

        Args:
            rows: Index of each row's task, (B,).
        """
        return Copied(self._twins, Routing.of_rows(rows, self.count), self._reads_images)


def _twin(path: str, bank: Bank, num_experts: int, count: int, *, blends: bool) -> Twin:
    if not isinstance(bank, StackedBank):
        raise ValueError(
            f"{path}: the shared adapter is a {bank.family.__name__}, which cannot stand in its bank once a task, so "
            "its gradients cannot be told task by task; choose another family, or a balance method that reads none"
        )
    if blends and bank.has_experts:
        raise ValueError(
            f"{path}: the router blends the parameters of the experts, among which copies of the shared adapter cannot "
            "stand, so its gradients cannot be told task by task; choose a router that blends outputs, or a balance "
            "method that reads no gradients"
        )
    experts = num_experts if bank.has_experts else 0
    return Twin(bank, bank.with_copies(count, experts), experts)
