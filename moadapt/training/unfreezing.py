"""Gradual unfreezing of adapters and routers: what stands still until a point of the training.

A parameter moves from the step on in which every stage that names it has begun. That is a function of the step alone,
so a resumed run needs no state for it. Parameters keep `requires_grad` from the start, as wrappers for several
processes count on it; while one stands still its gradient is thrown away before gradients are clipped, so the optimiser
neither decays it nor gathers moments, and starts it afresh when it thaws.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from moadapt.towers import TOWERS
from moadapt.training.roles import CROSS_MODAL, KINDS, ROUTER, Role

_KINDS = (*KINDS, ROUTER)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Parameters that stand still at first, and when they begin to move; exactly one of `share` and `epoch`.

    Args:
        kinds: `shared`, `expert`, `cross_modal` or `router`; None is all.
        towers: `vision`, `connector` or `language`; None is all, and routers.
        depth: First and last fraction of each tower's blocks, as in a placement; None is every depth, and what lies
            outside blocks.
        share: Of all steps, between 0 and 1.
        epoch: From 1; the first one is 0.

    Raises:
        ValueError: A name is unknown, a number is out of range, or the beginning is told twice or not at all.
    """

    kinds: tuple[str, ...] | None = None
    towers: tuple[str, ...] | None = None
    depth: tuple[float, float] | None = None
    share: float | None = None
    epoch: int | None = None

    def __post_init__(self) -> None:
        """Check names and ranges."""
        for name, known in (("kinds", _KINDS), ("towers", TOWERS)):
            given = getattr(self, name)
            if given is not None and (isinstance(given, str) or not given or set(given) - set(known)):
                raise ValueError(f"a stage's {name} are {given!r}; give a list of some of {', '.join(known)}")
        if (self.share is None) == (self.epoch is None):
            raise ValueError(f"a stage begins at share {self.share} and epoch {self.epoch}; give exactly one of them")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"a stage begins at share {self.share} of the steps; give a number between 0 and 1")
        if self.epoch is not None and self.epoch < 1:
            raise ValueError(f"a stage begins in epoch {self.epoch}; give 1 or more, as all trains from 0 without it")
        if self.depth is not None and not 0 <= self.depth[0] < self.depth[1] <= 1:
            raise ValueError(f"a stage's depth is {self.depth}; give two fractions with 0 <= first < last <= 1")

    def names(self, role: Role) -> bool:
        """Tell whether it is about parameters of a role."""
        kind = self.kinds is None or role.kind in self.kinds or (role.cross_modal and CROSS_MODAL in self.kinds)
        tower = self.towers is None or role.tower in self.towers
        return kind and tower and (self.depth is None or _within(role.depth, self.depth))

    def begun(self, step: int, steps: float, epoch: int) -> bool:
        """Tell whether it has begun.

        Args:
            step: From 0.
            steps: How many there will be.
            epoch: From 0.
        """
        return epoch >= self.epoch if self.epoch is not None else step >= (self.share or 0) * steps


class Unfreezing:
    """The stages of one training, with the parameters that they hold back.

    Args:
        stages: Each holds back what it names.
        roles: Every trained parameter, with what it is.
        steps: How many steps there will be; may be infinite where stages begin by epoch.
        epochs: How many epochs there will be; None where that is open.

    Raises:
        ValueError: A stage names nothing that is trained or never begins, or nothing trains at first.
    """

    def __init__(
        self, stages: Sequence[Stage], roles: Mapping[nn.Parameter, Role], steps: float, epochs: int | None = None
    ) -> None:
        self.steps = steps
        self._held = [(stage, [p for p, role in roles.items() if stage.names(role)]) for stage in stages]
        for stage, held in self._held:
            if not held:
                kinds = sorted({f"{role.kind} in {role.tower}" for role in roles.values()})
                raise ValueError(f"{stage} names nothing that is trained; there are {', '.join(kinds)}")
            if stage.share is not None and math.isinf(steps):
                raise ValueError(f"{stage} needs an end; give the trainer max_steps or max_epochs, or stages an epoch")
            if stage.epoch is not None and epochs is not None and stage.epoch >= epochs:
                raise ValueError(f"{stage} never begins, as the training ends after {epochs} epochs; begin earlier")
        if stages and len(self.still(0, 0)) == len(roles):
            raise ValueError("the stages of unfreezing hold back all that is trained; leave something for the first")

    def still(self, step: int, epoch: int) -> set[nn.Parameter]:
        """Return the parameters that a step leaves alone.

        Args:
            step: From 0.
            epoch: From 0.
        """
        waiting = (held for stage, held in self._held if not stage.begun(step, self.steps, epoch))
        return {parameter for held in waiting for parameter in held}


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Throw gradients away, so that an optimiser takes the parameters for unused."""
    for parameter in parameters:
        parameter.grad = None


def _within(depth: float | None, interval: tuple[float, float]) -> bool:
    return depth is not None and interval[0] - 1e-6 <= depth < interval[1] - 1e-6
