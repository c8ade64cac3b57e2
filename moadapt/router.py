"""The router interface: what a user writes, what is built from it, and what it may look at.

Axes: B rows, T tokens, E experts, D features.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moadapt.routing import Combines, Routing

if TYPE_CHECKING:
    from moadapt.fitting import Fitting

Scope = Literal["sequence", "token"]
Per = Literal["model", "tower", "layer", "site"]
Reads = Literal["place", "prompt", "outputs"]
FitsFrom = Literal["adapters", "examples", "loss"]
SCOPES: tuple[Scope, ...] = ("sequence", "token")
PER: tuple[Per, ...] = ("model", "tower", "layer", "site")
STATES = frozenset({"hidden", "output", "outputs"})
"""Fields of a routing context that exist only once the base runs."""
UNKNOWN_TASK = -1
"""Index of a task that a mixture does not know, where its router takes such tasks."""


@dataclass(frozen=True)
class RoutingContext:
    """What a router may look at, at its place.

    Routers that read the same hidden states share one context, so that these are normalised and pooled once.

    Args:
        hidden: Hidden states entering the place, (B, T, D), in towers before the language tower (N, P, D) with as many
            images, tiles or windows as there are, or (1, P, D) where all patches lie in one axis; for a router that
            reads the prompt, its text and its image, each normalised and averaged, side by side, (B, 1, D), zeros where
            a row has no image.
        prompt: Which tokens are prompt, True or False, (B, T); None where all are (vision towers).
        image: Which tokens stand for image patches, (B, T); None where there is no such difference.
        with_image: Which rows have an image in their prompt, (B,), also while a cache is continued; None where no image
            tokens are told.
        task_ids: Index of each row's task, (B,); `UNKNOWN_TASK` where it is none of the mixture's.
        available: Which experts may be chosen, (E,).
        real: Which tokens are no padding, (B, T); None where all are.
        progress: How much of the training is over, a scalar from 0 to 1; None where nothing is trained, as in a
            validation.
        tower: Name of the tower that the place is in.
        noise: What to draw from in training so that all processes draw the same; None where nobody cares.
        output: What the module of the place gives before anything is added, (B, T, F), for a router that reads outputs.
        outputs: What each expert would add to it with weight 1, (B, T, E, F), likewise.
        rows: Row of each entry of `hidden`, (N,) or, of all patches in one axis, (P,); None where row b has entry b.
        num_rows: B, where `rows` are told.
    """

    hidden: Tensor | None = None
    prompt: Tensor | None = None
    image: Tensor | None = None
    with_image: Tensor | None = None
    task_ids: Tensor | None = None
    available: Tensor | None = None
    real: Tensor | None = None
    progress: Tensor | None = None
    tower: str = "language"
    noise: torch.Generator | None = None
    output: Tensor | None = None
    outputs: Tensor | None = None
    rows: Tensor | None = None
    num_rows: int = 0

    @cached_property
    def pooled(self) -> Tensor:
        """One feature vector a row, (B, D), from prompt tokens only.

        Tokens are normalised, averaged over the prompt's text and over its image tokens, and the two averages are
        averaged, so that a short question is not drowned by many patches.
        """
        if self.rows is not None:
            return self._row_means(self.rows)
        if self.prompt is None:
            return self.tokens.mean(dim=1)
        means, filled = self.means
        return means.sum(dim=1) / filled.sum(dim=1, keepdim=True).clamp(min=1)

    def _row_means(self, rows: Tensor) -> Tensor:
        """Average the tokens of each row's own entries, (B, D), zeros where it has none."""
        tokens = self.tokens.flatten(0, 1)
        owners = rows.repeat_interleave(len(tokens) // len(rows), output_size=len(tokens))
        sums = tokens.new_zeros(self.num_rows, tokens.shape[-1]).index_add(0, owners, tokens)
        return sums / torch.bincount(owners, minlength=self.num_rows).clamp(min=1).unsqueeze(1)

    @cached_property
    def means(self) -> tuple[Tensor, Tensor]:
        """Averages of the prompt's normalised text tokens and, where there are any, image tokens.

        Returns:
            (B, kinds, D), zeros where a row has no token of a kind; and whether it has one, 0 or 1, (B, kinds).
        """
        assert self.prompt is not None, "only what has a prompt has kinds of tokens"
        kinds = [self.prompt] if self.image is None else [self.prompt & ~self.image, self.prompt & self.image]
        members = torch.stack([kind.to(self.tokens.dtype) for kind in kinds], dim=1)  # (B, kinds, T)
        counts = members.sum(dim=2, keepdim=True)
        with torch.autocast(self.tokens.device.type, enabled=False):
            return members / counts.clamp(min=1) @ self.tokens, (counts.squeeze(2) > 0).to(self.tokens.dtype)

    @cached_property
    def tokens(self) -> Tensor:
        """The normalised hidden states in float32, (B, T, D)."""
        assert self.hidden is not None, "the place gives its routers hidden states"
        return functional.layer_norm(self.hidden.float(), (self.hidden.shape[-1],))


class Router(nn.Module, ABC):
    """Gives each input its weights."""

    needs: ClassVar[frozenset[str]]
    """Fields of `RoutingContext` that it cannot do without: `hidden`, `task_ids`, `output`, `outputs`."""
    num_experts: int
    """E; known of routers that need `outputs`."""

    @abstractmethod
    def forward(self, context: RoutingContext) -> Routing:
        """Route the inputs of one call.

        Args:
            context: What is known at the router's place.
        """

    @abstractmethod
    def grow(self, count: int) -> None:
        """Make room for `count` more experts at the end; the old ones' parameters keep their bits."""

    @abstractmethod
    def trim(self, keep: Sequence[int]) -> None:
        """Keep only these experts, in this order."""

    def fit(self, fitting: "Fitting") -> None:
        """Take what it routes by from what is there, without training; nothing to take for most routers.

        Args:
            fitting: The adapters at its place, examples and losses, each found when it is asked for.

        Raises:
            ValueError: It cannot route by what is there.
        """

    def adopt(self, other: "Router") -> None:
        """Take over the state of the router that was at its place before, where it wraps one of that kind.

        Args:
            other: The router before; one of the wrapped kind.
        """

    def make_room(self, stored: Mapping[str, Tensor]) -> None:
        """Get ready to take in tensors that were saved, where what it was fitted to tells their shapes.

        Args:
            stored: By name.
        """


@dataclass(frozen=True, kw_only=True)
class RouterSpec(ABC):
    """What a user writes to choose a router: a value bound by YAML and saved as JSON.

    Args:
        scope: Whether a whole sequence or each token is routed.
        per: How many routers there are: one a model, tower, layer or site.

    Raises:
        ValueError: The class does not support the scope or the place.
    """

    scope: Scope = "sequence"
    per: Per = "layer"

    scopes: ClassVar[tuple[Scope, ...]] = SCOPES
    places: ClassVar[tuple[Per, ...]] = PER
    """What there may be one router of."""
    depends_on: ClassVar[Literal["nothing", "task", "input"]] = "input"
    reads: ClassVar[Reads] = "place"
    """Whether a router by input reads the hidden states of its place, the embedded prompt wherever it sits, or what the
    module of its site and each expert there give."""
    alike: ClassVar[bool] = False
    """Whether the routers of all places would give the same, so that one serves them all."""
    sums_to_one: ClassVar[bool] = True
    """Whether the weights of every input add up to 1, or to another constant, whatever the router has learned."""
    combines: ClassVar[Combines] = "outputs"
    """Whether the weights blend adapter outputs or adapter parameters."""
    taught_by_task: ClassVar[bool] = False
    """Whether training must tell the task of every row, though in use the router does without."""

    def __post_init__(self) -> None:
        """Check scope and place."""
        name = type(self).__name__
        if self.scope not in self.scopes:
            raise ValueError(f"{name} routes by {' or '.join(self.scopes)}, not by {self.scope!r}; change scope")
        if self.per not in PER:
            raise ValueError(f"{name} got per={self.per!r}; choose one of {', '.join(PER)}")
        if self.per not in self.places:
            raise ValueError(
                f"{name} decides at each {' or '.join(self.places)}, where what it reads is known, and not once a "
                f"{self.per}; leave per out"
            )

    @abstractmethod
    def build(self, dim: int, num_experts: int) -> Router:
        """Build the router of one place.

        Args:
            dim: Width of the hidden states there, D; 0 for a router that reads none.
            num_experts: E.
        """

    def task_names(self, experts: Sequence[str]) -> tuple[str, ...]:
        """Return the tasks that rows may have, in the order of their indices.

        Args:
            experts: Names of the experts, which are those of the tasks unless the router knows better.
        """
        return tuple(experts)

    @property
    def inner(self) -> "RouterSpec | None":
        """The router that it wraps; None where there is none."""
        return None

    @property
    def fits_from(self) -> frozenset[FitsFrom]:
        """What its routers are fitted from, without training, by `moadapt.fit_router`; nothing where they are trained.

        These are the adapters at a place, examples with their tasks, or the loss of examples under given weights.
        """
        return frozenset()

    @property
    def passes(self) -> int:
        """How many times training runs a batch, each with a routing of its own; more than 1 for sampled choices."""
        return 1

    @property
    def taught_by_loss(self) -> bool:
        """Whether the loss of the answers teaches it something, if it learns at all."""
        return True

    def policy_loss(self, log_prob: Tensor, losses: Tensor) -> Tensor:
        """Return what teaches routers by their sampled choices, a scalar; asked where there are several passes.

        Args:
            log_prob: Log-probability of each row's choices, over all places and tokens, (M, B).
            losses: Summed loss of each row's answer, (M, B), with M the number of passes.
        """
        raise AssertionError(f"{type(self).__name__} samples nothing")

    @property
    def tells_images(self) -> bool:
        """Whether it cannot do without knowing which tokens stand for images."""
        return False

    @property
    def num_heads(self) -> int:
        """How many slices of the features have weights of their own, H."""
        return 1

    @property
    def takes_unknown_tasks(self) -> bool:
        """Whether rows may have a task that is none of these."""
        return False


def mask_unavailable(logits: Tensor, available: Tensor | None) -> Tensor:
    """Set the logits of unavailable experts to minus infinity.

    Args:
        logits: (..., E).
        available: True where an expert may be chosen, (E,).
    """
    return logits if available is None else logits.masked_fill(~available, float("-inf"))
