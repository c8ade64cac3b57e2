"""What routers decided at one place, input by input, as objectives and measures read it.

Axes: N inputs (rows, or tokens, of every head), E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from moadapt.router import RoutingContext
from moadapt.tracing import Observation


@dataclass(frozen=True)
class Routed:
    """The inputs that one place routed in a batch.

    Tokens count where they are prompt, and all tokens of a tower that knows no prompt; rows count always.

    Args:
        weights: What every expert got, (N, E).
        chosen: Whether an expert was chosen, (N, E).
        counted: 1 for an input that counts, else 0, (N,).
        real: 1 for an input that is no padding, be it prompt or answer, else 0, (N,).
        logits: What the weights were made of, (N, E); None where there are none.
        tasks: Index of the task of each input's row, (N,); None where tasks were not told.
        images: Whether an input is an image token, (N,); None where there is no such difference.
        utilities: What each expert by itself is worth to each input's row, (N, E); None where that was not measured.
        shape: How the inputs lie, rows, tokens and heads.
        num_tasks: How many tasks there are.
        task_experts: For each task the expert that bears its name, -1 where there is none, (tasks,).
    """

    weights: Tensor
    chosen: Tensor
    counted: Tensor
    real: Tensor
    logits: Tensor | None
    tasks: Tensor | None
    images: Tensor | None
    utilities: Tensor | None
    shape: tuple[int, int, int]
    num_tasks: int
    task_experts: Tensor

    @property
    def num_experts(self) -> int:
        """E."""
        return self.weights.shape[-1]

    @cached_property
    def probabilities(self) -> Tensor:
        """The softmax of the logits, before any choice among experts; without logits, the weights' shares; (N, E)."""
        if self.logits is None:
            return self.weights / self.weights.sum(-1, keepdim=True).clamp(min=1e-12)
        return self.logits.softmax(-1)

    @cached_property
    def shares(self) -> Tensor:
        """What every expert got of an input's weights, without their signs, (N, E); zeros where it got nothing."""
        sizes = self.weights.abs()
        return sizes / sizes.sum(-1, keepdim=True).clamp(min=1e-12)

    @cached_property
    def entropy(self) -> Tensor:
        """Entropy of each input's probabilities, in nats, (N,)."""
        return entropy(self.probabilities)

    def total(self, values: Tensor) -> Tensor:
        """Sum values over the inputs that count.

        Args:
            values: (N,) or (N, ...).
        """
        return torch.einsum("n,n...->...", self.counted.to(values.dtype), values)

    def total_by_task(self, values: Tensor) -> Tensor:
        """Sum values over the inputs of each task that count, (tasks, E); those of a task unknown count nowhere.

        Args:
            values: (N, E).
        """
        assert self.tasks is not None, "tasks were told"
        own = self.tasks.unsqueeze(1) == torch.arange(self.num_tasks, device=self.tasks.device)
        return torch.einsum("ns,n,ne->se", own.to(values.dtype), self.counted.to(values.dtype), values)

    def with_answers(self) -> "Routed":
        """Return the same inputs, of which tokens of answers count as well."""
        return replace(self, counted=self.real)

    @property
    def count(self) -> Tensor:
        """How many inputs count, a scalar."""
        return self.counted.sum()


def entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy over the last axis, in nats; what has probability 0 adds nothing, and no gradient.

    Args:
        probabilities: (..., E).
    """
    positive = probabilities.clamp(min=1e-30)
    return -(positive * positive.log()).sum(-1)


def information(joint: Tensor) -> Tensor:
    """Return the mutual information of rows and columns, in nats, from 0.

    Args:
        joint: How often they come together, from 0, in any unit, (rows, columns).
    """
    joint = joint / joint.sum().clamp(min=1e-12)
    return entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint.flatten())


def routed_at(
    observed: Observation, experts: Sequence[str], tasks: Sequence[str], utilities: Tensor | None = None
) -> Routed:
    """Lay out the inputs of one observation.

    Args:
        observed: One routing, as it was decided.
        experts: Names of the experts.
        tasks: Names of the tasks.
        utilities: What each expert by itself is worth to each row, (B, E).
    """
    routing, seen = observed.routing, observed.seen
    weights = routing.dense()
    rows, tokens, heads, width = weights.shape
    if routing.indices is None:
        chosen = weights.detach() != 0
    else:
        chosen = torch.zeros_like(weights, dtype=torch.bool).scatter(3, routing.indices, value=True)
    every = weights.new_ones(rows * tokens * heads)
    counted = _each(seen.prompt, weights) if routing.per_token else _with_image(seen, weights)
    real = _each(seen.real, weights) if routing.per_token else None
    owners = _owners(observed, weights)
    task_ids = _input_tasks(seen, weights, owners)
    return Routed(
        weights.reshape(-1, width),
        chosen.reshape(-1, width),
        every if counted is None else counted.to(weights.dtype),
        every if real is None else real.to(weights.dtype),
        None if routing.logits is None else routing.logits.expand(rows, tokens, heads, -1).reshape(-1, width),
        task_ids,
        _each(seen.image, weights) if routing.per_token else None,
        None if utilities is None else _of_rows(utilities, weights, owners, observed.place),
        (rows, tokens, heads),
        len(tasks),
        _task_experts(experts, tasks, weights.device),
    )


def inputs_of_rows(observed: Observation, rows: int) -> tuple[Tensor, Tensor]:
    """Return at how many of each row's real inputs every expert had any weight, (B, E), and how many there are, (B,).

    Args:
        observed: One routing, as it was decided; where it is the same for all rows, each row has its inputs.
        rows: B.
    """
    routed = routed_at(observed, (), ())
    real = routed.real if observed.routing.per_token else routed.counted
    used = (routed.weights.detach() != 0).to(real) * real.unsqueeze(1)
    own, tokens, heads = routed.shape
    owners = _owners(observed, observed.routing.dense())
    if owners is None and own == 1:
        return used.sum(0).expand(rows, -1), real.sum().expand(rows)
    if owners is None:
        owners = torch.arange(own, device=real.device).repeat_interleave(tokens)
    owners = owners.repeat_interleave(heads)
    found = used.new_zeros(rows, used.shape[1]).index_add_(0, owners, used)
    return found, real.new_zeros(rows).index_add_(0, owners, real)


def with_tasks(observed: Observation, task_ids: Tensor) -> Observation:
    """Return an observation whose rows are told these tasks, whatever the mixture was told.

    Args:
        observed: One routing, as it was decided.
        task_ids: Index of each row's task, (B,).
    """
    return replace(observed, seen=replace(observed.seen, task_ids=task_ids))


def nothing_routed(experts: Sequence[str], tasks: Sequence[str], device: torch.device) -> Routed:
    """Return no inputs at all, for a place that a batch does not reach.

    Args:
        experts: Names of the experts.
        tasks: Names of the tasks.
        device: Of the tensors.
    """
    none = torch.zeros(0, len(experts), device=device)
    owners = _task_experts(experts, tasks, device)
    each = none[:, 0]
    return Routed(none, none.bool(), each, each, none, each.long(), None, none, (0, 0, 1), len(tasks), owners)


def _owners(observed: Observation, weights: Tensor) -> Tensor | None:
    """Return the row of each routed image, tile or patch, (rows * tokens,); None where row b has those of row b."""
    of_entries = observed.seen.rows
    if of_entries is None or observed.by_sequence:
        return None
    count = weights.shape[0] * weights.shape[1]
    return of_entries.repeat_interleave(count // len(of_entries), output_size=count)


def _input_tasks(seen: RoutingContext, weights: Tensor, owners: Tensor | None) -> Tensor | None:
    """Return the task of each routed input, (N,); None where tasks were not told, or whose inputs these are."""
    task_ids, (rows, tokens, heads) = seen.task_ids, weights.shape[:3]
    if task_ids is None:
        return None
    if owners is not None:
        return task_ids.expand(seen.num_rows)[owners].repeat_interleave(heads)
    if rows * tokens == 1:
        return task_ids[:1].expand(heads)
    return task_ids.expand(rows).repeat_interleave(tokens * heads) if len(task_ids) in (1, rows) else None


def _with_image(seen: RoutingContext, weights: Tensor) -> Tensor | None:
    """Return which inputs of a routing by rows count, (N,), in a tower that rows without an image do not reach."""
    rows, _, heads = weights.shape[:3]
    if seen.rows is not None and seen.num_rows == rows:  # of the run of the tower that was read
        return (torch.bincount(seen.rows, minlength=rows) > 0).repeat_interleave(heads)
    if seen.tower == "language" or seen.with_image is None or len(seen.with_image) != rows:
        return None
    return seen.with_image.repeat_interleave(heads)


def _task_experts(experts: Sequence[str], tasks: Sequence[str], device: torch.device) -> Tensor:
    by_name = {name: index for index, name in enumerate(experts)}
    return torch.tensor([by_name.get(name, -1) for name in tasks], dtype=torch.long, device=device)


def _of_rows(utilities: Tensor, weights: Tensor, owners: Tensor | None, place: str) -> Tensor:
    """Spread what rows have, (B, E), over the inputs of a routing, (N, E)."""
    if owners is not None:
        return utilities[owners].repeat_interleave(weights.shape[2], dim=0)
    if len(utilities) != len(weights):
        raise ValueError(
            f"utilities are those of {len(utilities)} rows, but the routing at {place} has {len(weights)}; leave "
            "experts out there, or leave out the objective that asks for utilities"
        )
    return utilities.repeat_interleave(weights.shape[1] * weights.shape[2], dim=0)


def _each(mask: Tensor | None, weights: Tensor) -> Tensor | None:
    """Spread a mask of tokens, (B, T), over the inputs of a routing by token, (N,)."""
    if mask is None:
        return None
    rows, tokens, heads = weights.shape[:3]
    return mask[:, -tokens:].expand(rows, tokens).unsqueeze(2).expand(rows, tokens, heads).reshape(-1)
