"""What routers learn from in training: whether anything teaches them, the tasks they hear of, the chances they took."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moadapt.mixture import Mixture
from moadapt.objectives import RoutingObjective
from moadapt.router import RouterSpec
from moadapt.tracing import Observation


def check_taught(router: RouterSpec | None, mixture: Mixture, objectives: Iterable[RoutingObjective]) -> None:
    """Refuse routers that would stay as they began, at random.

    Args:
        router: What the user chose.
        mixture: The mixture to be trained.
        objectives: Those on routings.

    Raises:
        ValueError: Neither the answers nor an objective teaches them.
    """
    learns = any(parameter.requires_grad for parameter in mixture.routers.parameters())
    if router is None or router.taught_by_loss or not learns:
        return
    if not any(objective.weight for objective in objectives):
        raise ValueError(
            f"{router} gives its expert weight 1 whatever it learned, so the loss of the answers teaches it nothing; "
            "add an objective on routings, such as task_cross_entropy, with a weight above 0, or choose another router"
        )


def check_tasks(router: RouterSpec, experts: Sequence[str], tasks: Sequence[str], *, fits: bool) -> None:
    """Require that a router knows the tasks of the data where it goes by task, or in a fit is taught by it.

    Args:
        router: What the user chose.
        experts: Names of the experts.
        tasks: Those of the data.
        fits: Whether it is about to be trained.

    Raises:
        ValueError: It does not know one, or, in training, knows one that the data lacks.
    """
    by_task = router.depends_on == "task"
    if not (by_task or (router.taught_by_task and fits)):
        return
    known = router.task_names(experts)
    strange = [] if router.takes_unknown_tasks else [name for name in tasks if name not in known]
    idle = [name for name in known if name not in tasks and fits and by_task]
    alone = {"tasks that it does not know": strange, "tasks that the data lacks": idle}
    told = [f"{what}: {', '.join(names)}" for what, names in alone.items() if names]
    if told:
        raise ValueError(
            f"the router goes by task, and there are {'; '.join(told)}. The data has the tasks {', '.join(tasks)}; "
            "name the experts after them, or give the router its tasks where it takes some"
        )


def log_prob_of(observed: Iterable[Observation], rows: int) -> Tensor:
    """Return the log-probability of each row's sampled choices, over all places, (B,).

    Args:
        observed: What routers decided.
        rows: B.
    """
    found = [each.routing.log_prob for each in observed]
    return torch.stack([chance.expand(rows, 1, 1)[:, 0, 0] for chance in found if chance is not None]).sum(dim=0)
