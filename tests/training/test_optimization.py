import math

import pytest
import torch
from torch import nn

from moadapt.training.optimization import Optimization, Role, check_groups, parameter_groups


def test_groups_have_the_rates_of_tower_and_kind_and_leave_vectors_undecayed() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("vision", "language", "router")})
    roles = {
        p: Role(name, "router" if name == "router" else "expert") for name, m in model.items() for p in m.parameters()
    }
    settings = Optimization(
        learning_rate=2e-4, router_learning_rate=3e-5, tower_learning_rates={"vision": 1e-4}, weight_decay=0.1
    )
    groups = {group["name"]: group for group in parameter_groups(roles, settings)}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "vision/expert": (1e-4, 0.1),
        "vision/expert/vectors": (1e-4, 0.0),
        "language/expert": (2e-4, 0.1),
        "language/expert/vectors": (2e-4, 0.0),
        "router": (3e-5, 0.1),
        "router/vectors": (3e-5, 0.0),
    }
    check_groups(groups.values(), model)


def test_a_parameter_in_no_group_or_in_two_is_noticed() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="bias"):
        check_groups([{"params": [model.weight]}], model)
    with pytest.raises(AssertionError, match="two groups"):
        check_groups([{"params": [model.weight, model.bias]}, {"params": [model.bias]}], model)


@pytest.mark.parametrize("warmup", [0.2, 20])
def test_rates_rise_and_fall_along_a_cosine(warmup: float) -> None:
    settings = Optimization(warmup=warmup)
    factors = [settings.factor(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 21)
    assert factors[19] == pytest.approx(20 / 21)
    assert factors[20] == 1
    assert factors[60] == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert factors[100] == pytest.approx(0)


def test_a_constant_schedule_stays_also_without_an_end() -> None:
    settings = Optimization(warmup=2, schedule="constant")
    assert [settings.factor(step, math.inf) for step in range(4)] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1, 1]


@pytest.mark.parametrize(
    "wrong",
    [{"tower_learning_rates": {"visoin": 1e-4}}, {"learning_rate": 0.0}, {"weight_decay": -1}, {"schedule": "step"}],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"towers are vision|above 0|cosine or constant"):
        Optimization(**wrong)  # type: ignore[arg-type]


def test_torch_runs_the_schedule() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: Optimization(warmup=0).factor(step, 2))
    assert optimizer.param_groups[0]["lr"] == 2.0
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.0)
