"""How a training moves: learning rates by tower and kind, decay, warm-up and schedule."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from moadapt.towers import TOWERS
from moadapt.training.roles import CROSS_MODAL, KINDS, ROUTER, Role
from moadapt.training.unfreezing import Stage

RECIPE = {"vision": 1e-4, "language": 2e-4, CROSS_MODAL: 5e-5}
"""Peak rates by default, as published for adapters in both towers and between them; all else has that of language."""


@dataclass(frozen=True)
class Optimization:
    """Settings of the optimiser.

    Args:
        learning_rate: Peak rate of whatever has no rate of its own below; None is a recipe: 1e-4 for adapters in the
            vision tower, 5e-5 for cross-modal ones, 2e-4 for all others and for routers.
        router_learning_rate: Peak rate of routers.
        tower_learning_rates: Peak rates of the adapters in a tower: `vision`, `connector`, `language`.
        kind_learning_rates: Peak rates of adapters by what they are, which go before those of towers: `shared`,
            `expert`, and before these `cross_modal`; with a tower before it, `vision/shared`, it goes before all.
        weight_decay: Decay of matrices; vectors, such as biases, are not decayed.
        betas: AdamW's decays of its two moments.
        warmup: How long the rates rise: a share of all steps below 1, or a number of steps.
        schedule: What they do then: fall to 0 along a cosine, or stay.
        unfreezing: What stands still at first, and from when on it moves; all else trains from the start.
        expert_mean: What an expert's gradient is a mean over: the answer tokens of the `batch`, or of its rows in `use`
            of the expert.

    Raises:
        ValueError: A tower is unknown, or a number is out of range.
    """

    learning_rate: float | None = None
    router_learning_rate: float | None = None
    tower_learning_rates: dict[str, float] | None = None
    kind_learning_rates: dict[str, float] | None = None
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.03
    schedule: Literal["cosine", "constant"] = "cosine"
    unfreezing: tuple[Stage, ...] = ()
    expert_mean: Literal["batch", "use"] = "batch"

    def __post_init__(self) -> None:
        """Check names and ranges."""
        by_tower, by_kind = self.tower_learning_rates or {}, self.kind_learning_rates or {}
        if unknown := sorted(set(by_tower) - set(TOWERS)):
            raise ValueError(f"tower_learning_rates names {', '.join(unknown)}; towers are {', '.join(TOWERS)}")
        if unknown := sorted(set(by_kind) - {*KINDS, *(f"{tower}/{kind}" for tower in TOWERS for kind in KINDS)}):
            raise ValueError(
                f"kind_learning_rates names {', '.join(unknown)}; kinds are {', '.join(KINDS)}, each also with a tower "
                f"before it, as in vision/shared; routers have router_learning_rate"
            )
        alone = [rate for rate in (self.learning_rate, self.router_learning_rate) if rate is not None]
        rates, others = [*alone, *by_tower.values(), *by_kind.values()], [self.weight_decay, self.warmup]
        if not all(map(math.isfinite, [*rates, *others])) or min([*rates, 1]) <= 0 or min(others) < 0:
            raise ValueError(f"{self} is out of range; learning rates are above 0, weight_decay and warmup at least 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; give two numbers from 0 to below 1")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule is {self.schedule!r}; give cosine or constant")
        if self.expert_mean not in ("batch", "use"):
            raise ValueError(f"expert_mean is {self.expert_mean!r}; give batch or use")

    def rate(self, role: Role) -> float:
        """Return the peak learning rate of parameters: the most specific one that is given.

        Args:
            role: What they are; its own factor is left out.
        """
        kinds = ([CROSS_MODAL] if role.cross_modal else []) + [role.kind]
        given = {
            **(self.tower_learning_rates or {}),
            **(self.kind_learning_rates or {}),
            **({} if self.router_learning_rate is None else {ROUTER: self.router_learning_rate}),
        }
        own = [f"{role.tower}/{kind}" for kind in kinds]
        found = next((given[name] for name in (*own, *kinds, role.tower) if name in given), self.learning_rate)
        part = CROSS_MODAL if role.cross_modal else role.tower
        return RECIPE.get(part, RECIPE["language"]) if found is None else found

    def factor(self, step: int, steps: float) -> float:
        """Return what the peak rates are multiplied by in a step.

        Args:
            step: From 0.
            steps: How many there will be; may be infinite under a constant schedule.
        """
        warm = self.warmup * steps if self.warmup < 1 and math.isfinite(steps) else self.warmup
        if step < warm:
            return (step + 1) / (warm + 1)
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1.0, steps - warm))))


def parameter_groups(roles: Mapping[nn.Parameter, Role], settings: Optimization) -> list[dict[str, Any]]:
    """Group parameters by role and by whether they are decayed.

    Args:
        roles: Every trained parameter, with what it is.
        settings: Rates and decay.

    Returns:
        Groups for a torch optimiser, each with a `name`.
    """
    groups: dict[str, dict[str, Any]] = {}
    for parameter, role in roles.items():
        decays = role.decays and parameter.ndim > 1
        parts = [role.tower, *([CROSS_MODAL] if role.cross_modal else []), role.kind]
        name = "/".join(dict.fromkeys(parts)) + ("" if decays else "/vectors")
        name += "" if role.factor == 1 else f"/x{role.factor:g}"
        rate, decay = settings.rate(role) * role.factor, settings.weight_decay if decays else 0.0
        fresh = {"params": [], "lr": rate, "weight_decay": decay, "name": name}
        groups.setdefault(name, fresh)["params"].append(parameter)
    return list(groups.values())


def check_groups(groups: Iterable[Mapping[str, Any]], model: nn.Module) -> None:
    """Assert that every trained parameter is in exactly one group, and no other is in any."""
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    assert set(grouped) == set(trained), f"without a group: {[n for i, n in trained.items() if i not in grouped][:3]}"
