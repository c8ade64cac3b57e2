import math

import pytest
import torch
from torch import nn

from moadapt.adapters import CrossModal, LoRA
from moadapt.placement import Placement
from moadapt.training import MixtureModule
from moadapt.training.optimization import Optimization, check_groups, parameter_groups
from moadapt.training.roles import Role
from moadapt_routers import TopK


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


RECIPE = {
    ("vision", False): 1e-4, ("vision", True): 5e-5, ("language", False): 2e-4, ("language", True): 5e-5,
    ("connector", False): 2e-4,
}  # fmt: skip


@pytest.mark.parametrize(("place", "rate"), RECIPE.items())
@pytest.mark.parametrize("kind", ["shared", "expert"])
def test_without_a_rate_adapters_have_those_of_the_recipe(place: tuple[str, bool], rate: float, kind: str) -> None:
    tower, crosses = place
    assert Optimization().rate(Role(tower, kind, cross_modal=crosses)) == rate
    assert Optimization().rate(Role("router", "router")) == 2e-4
    assert Optimization(learning_rate=3e-3).rate(Role(tower, kind, cross_modal=crosses)) == 3e-3


def test_the_most_specific_rate_counts() -> None:
    settings = Optimization(
        learning_rate=1e-1,
        tower_learning_rates={"vision": 1e-2},
        kind_learning_rates={"shared": 1e-3, "vision/expert": 1e-4, "cross_modal": 1e-5, "language/cross_modal": 1e-6},
    )
    expected = {
        Role("connector", "expert"): 1e-1,
        Role("vision", "adapter"): 1e-2,
        Role("language", "shared"): 1e-3,
        Role("vision", "shared"): 1e-3,
        Role("vision", "expert"): 1e-4,
        Role("vision", "expert", cross_modal=True): 1e-4,
        Role("vision", "shared", cross_modal=True): 1e-5,
        Role("language", "shared", cross_modal=True): 1e-6,
        Role("router", "router"): 1e-1,
    }
    assert {role: settings.rate(role) for role in expected} == expected


def test_a_mixture_tells_towers_kinds_and_cross_modal_adapters_apart(base: str) -> None:
    both = Placement(towers=("vision", "language"))
    module = MixtureModule(base, {"a": LoRA(rank=2, placement=both), "b": CrossModal(rank=2)}, LoRA(), TopK())
    module.configure_model()
    groups = parameter_groups(module.roles(), module.optimization)
    check_groups(groups, module)
    matrices = {group["name"]: group["lr"] for group in groups if not group["name"].endswith("vectors")}
    assert matrices == {
        "vision/expert": 1e-4,
        "language/expert": 2e-4,
        "language/shared": 2e-4,
        "language/cross_modal/expert": 5e-5,
        "router": 2e-4,
    }
    gates = [p for _, bank in module.mixture.banks() for name, p in bank.named_parameters() if "gate" in name]
    undecayed = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert gates
    assert {id(gate) for gate in gates} <= undecayed


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
    [
        {"tower_learning_rates": {"visoin": 1e-4}},
        {"kind_learning_rates": {"experts": 1e-4}},
        {"kind_learning_rates": {"vision/router": 1e-4}},
        {"kind_learning_rates": {"shared": 0.0}},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"warmup": float("nan")},
        {"weight_decay": float("nan")},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"router_learning_rate": 0.0},
        {"weight_decay": -1},
        {"schedule": "step"},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"towers are vision|kinds are shared|above 0|cosine or constant|betas are"):
        Optimization(**wrong)  # type: ignore[arg-type]


def test_torch_runs_the_schedule() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: Optimization(warmup=0).factor(step, 2))
    assert optimizer.param_groups[0]["lr"] == 2.0
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.0)
