"""Values of the objectives on routings, over all processes."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moadapt.mixture import Mixture
from moadapt.objectives import RoutingObjective
from moadapt.routed import Routed, nothing_routed, routed_at
from moadapt.tracing import Observation


def routing_values(
    objectives: Mapping[str, RoutingObjective],
    mixture: Mixture,
    observed: Sequence[Observation],
    reduce: Callable[[Tensor], Tensor],
    tasks: Sequence[str] | None = None,
    utilities: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the value of every objective: the mean over places of what it is for the inputs of all processes.

    Gradients reach this process's inputs; added up over processes they are those of the whole batch.

    Args:
        objectives: By name.
        mixture: The mixture in training.
        observed: What its routers decided in this process's batch.
        reduce: Sums a tensor over processes; called once.
        tasks: Names of the tasks of the observed rows; by default those that the mixture knows.
        utilities: What each expert by itself is worth to each row of this process, (B, E), where objectives ask.

    Raises:
        ValueError: No router decided anything.
    """
    if not mixture.places:
        raise ValueError(
            "there is no routing to judge, as nothing is routed in this mixture; leave out "
            f"{', '.join(type(objective).__name__ for objective in objectives.values())}, or give experts and a router"
        )
    places = _by_place(mixture, observed, mixture.tasks if tasks is None else tasks, utilities)
    own = {
        (name, place): torch.stack([_sums(objective, routed) for routed in here]).sum(dim=0)
        for name, objective in objectives.items()
        for place, here in places.items()
    }
    counts = torch.stack([torch.stack([routed.count for routed in here]).sum() for here in places.values()])
    parts = [counts, *own.values()]
    # one number type on all processes, whichever places each of them reached
    exact = torch.promote_types(mixture.base.dtype, torch.float32)
    flat = torch.cat([part.to(exact) for part in parts])
    whole = flat + (reduce(flat.detach()) - flat.detach())  # the value is global, the gradient this process's
    counts, *parts = torch.split(whole, [len(part) for part in parts])
    sums = dict(zip(own, parts, strict=True))
    reached = [place for place, count in zip(places, counts.tolist(), strict=True) if count]
    return {
        name: torch.stack([objective.value(sums[name, place], places[place][0]) for place in reached]).mean()
        for name, objective in objectives.items()
    }


def _sums(objective: RoutingObjective, routed: Routed) -> Tensor:
    return objective.sums(routed.with_answers() if objective.counts_answers else routed)


def _by_place(
    mixture: Mixture, observed: Sequence[Observation], tasks: Sequence[str], utilities: Tensor | None
) -> dict[str, list[Routed]]:
    """Lay out what was observed by place, the same places on every process; where nothing was, no inputs."""
    found: dict[str, list[Routed]] = {place.name: [] for place in mixture.places}
    for each in observed:
        found[each.place].append(routed_at(each, mixture.experts, tasks, utilities))
    none = nothing_routed(mixture.experts, tasks, mixture.base.device)
    return {place: here or [none] for place, here in found.items()}
