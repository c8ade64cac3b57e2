"""Several processes that hold different tasks train what one process trains with the whole batch."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moadapt.adapters import FamilySpec, LoRA
from moadapt.objectives import LoadBalance
from moadapt.placement import Placement
from moadapt.registry import FAMILIES
from moadapt.router import RouterSpec
from moadapt.training import MixedTasks, MixtureModule, Optimization, data
from moadapt.training.module import TaskModule
from moadapt.training.order import Draw, MixedOrder, Place
from moadapt.training.routing_log import LogRouting
from moadapt_routers import ByTask, Poly, TopK
from tests.conformance.canonical import VISION
from tests.training import toy
from tests.training.processes import assert_same, fit, randomized

EXACT = {"precision": "64-true", "gradient_clip_val": 1.0}
FAST = Optimization(learning_rate=1e-2)
TOWERS = Placement(towers=("vision", "language"))


class TaskByTask(MixedOrder):
    """The same batches, sorted: with equally many rows each process gets one of the two tasks."""

    def batch(self, place: Place) -> tuple[list[Draw], Place]:
        draws, after = super().batch(place)
        return sorted(draws, key=lambda draw: draw.row), after


class FirstAlone(TaskByTask):
    """Every second batch has the first task alone."""

    def batch(self, place: Place) -> tuple[list[Draw], Place]:
        draws, after = super().batch(place)
        return [Draw(row, 0) for row in range(self.batch_size)] if place.step % 2 else draws, after


def mixture(base: str, router: RouterSpec | None, family: FamilySpec | None = None, **options: Any) -> MixtureModule:
    """Two experts and a shared adapter, none of whose numbers is zero."""
    family = family or LoRA(rank=2)
    experts = {name: family for name in ("small", "large")} if router else None
    taught = [LoadBalance()] if router == TopK(k=1) else None  # nothing else teaches it
    options = {"objectives": taught, "optimization": FAST, **options}
    module = MixtureModule(base, experts, family, router, **options)
    randomized(module)
    return module


def made(make: Callable[[], TaskModule], folder: Path, **options: Any) -> tuple[TaskModule, MixedTasks]:
    """A module and two tasks of six rows each."""
    module = make()
    rows = options.pop("rows", (6, 6))
    return module, MixedTasks(module.base, toy.toy_tasks(folder, rows=rows), **{"batch_size": 4, **options})


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize(
    "router",
    [ByTask(), TopK(k=1), TopK(k=2, scope="token"), Poly(heads=2), None],
    ids=["task", "top1", "top2", "skills", "shared"],
)
def test_two_processes_with_different_tasks_train_as_one(
    tmp_path: Path, base: str, router: RouterSpec | None, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MixedOrder", TaskByTask)
    make = partial(made, partial(mixture, base, router, gradient_checkpointing=checkpointing), tmp_path)
    [one] = fit(tmp_path / "one", make, 1, **EXACT)
    two = fit(tmp_path / "two", make, 2, **EXACT)
    assert [set(tasks) for own in two for tasks in own["tasks"]] == [{"small"}] * 3 + [{"large"}] * 3
    # routers and pooled features are float32 by design; everything else is float64
    assert_same(two, one, 1e-9 if isinstance(router, ByTask | None) else 1e-6)


CASES = [
    pytest.param(seed, processes, marks=() if (seed, processes) in ((0, 2), (1, 4)) else pytest.mark.slow)
    for seed in range(10)
    for processes in (2, 4)
]


@pytest.mark.parametrize(("seed", "processes"), CASES)
def test_any_data_on_any_processes_trains_as_one(
    tmp_path: Path, base: str, seed: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that fill no whole number of batches, an epoch that ends within an accumulation, a task on one process."""
    draw = np.random.default_rng(seed)
    rows, batch_size = tuple(map(int, draw.integers(3, 12, 2))), processes * int(draw.integers(1, 3))
    accumulated, router = int(draw.integers(1, 4)), [ByTask(), TopK(k=1), TopK(k=2, scope="token")][seed % 3]
    if seed % 2:
        monkeypatch.setattr(data, "MixedOrder", TaskByTask)
    make = partial(made, partial(mixture, base, router), tmp_path, rows=rows, batch_size=batch_size)
    options = {**EXACT, "max_steps": 4, "accumulate_grad_batches": accumulated}
    [one] = fit(tmp_path / "one", make, 1, **options)
    several = fit(tmp_path / "several", make, processes, **options)
    assert_same(several, one, 1e-9 if isinstance(router, ByTask) else 1e-6)


def half_blind(make: Callable[[], TaskModule], folder: Path) -> tuple[TaskModule, MixedTasks]:
    """A task without pictures and one with them."""
    module = make()
    tasks = {
        "small": toy.Colour(root=str(folder / "small"), blind=True),
        "large": toy.Colour(root=str(folder / "large"), upper=True),
    }
    return module, MixedTasks(module.base, tasks, batch_size=4)


@pytest.mark.parametrize("router", [ByTask(), Poly(heads=2)], ids=["task", "drawn"])
def test_what_no_row_of_a_process_reached_takes_part_and_what_no_row_reached_at_all_is_left_alone(
    tmp_path: Path, base: str, router: RouterSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what routers draw at a place does not depend on the places that a process came to before."""
    monkeypatch.setattr(data, "MixedOrder", FirstAlone)
    make = partial(half_blind, partial(mixture, base, router, placement=TOWERS), tmp_path)
    [one] = fit(tmp_path / "one", make, 1, **EXACT)
    two = fit(tmp_path / "two", make, 2, **EXACT)
    assert [[set(tasks) for tasks in own["tasks"]] for own in two] == [
        [{"small"}, {"small"}, {"small"}],
        [{"large"}, {"small"}, {"large"}],
    ]
    for step, kinds in enumerate(zip(*(own["own"] for own in two), strict=True)):
        seeing = [{kind for name, kind in own.items() if "vision" in name} for own in kinds]
        assert seeing == [{"none"}, {"none"} if step == 1 else {"some"}]
    assert_same(two, one, 1e-9 if router == ByTask() else 1e-6)
    assert [any("vision" in name for name in step) for step in two[0]["gradients"]] == [True, False, True]


QUICK = ("lora", "peft", "soft_slots")
FAMILY_CASES = [
    pytest.param(family, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, family in FAMILIES
]


@pytest.mark.parametrize("family", FAMILY_CASES)
def test_every_family_trains_on_two_processes_as_on_one(
    tmp_path: Path, base: str, family: type[FamilySpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MixedOrder", TaskByTask)
    where = None if family.causal else VISION
    make = partial(made, partial(mixture, base, ByTask(), family(), placement=where), tmp_path)
    [one] = fit(tmp_path / "one", make, 1, **EXACT)
    two = fit(tmp_path / "two", make, 2, **EXACT)
    assert_same(two, one, 1e-6)


def test_what_is_logged_counts_the_rows_of_all_processes(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of routers and tasks that a process has no row of: the others must not wait for it."""
    monkeypatch.setattr(data, "MixedOrder", FirstAlone)
    make = partial(half_blind, partial(mixture, base, TopK(k=1), placement=TOWERS), tmp_path)
    options = {"limit_val_batches": 1.0, "log_every_n_steps": 1, **EXACT}
    [one] = fit(tmp_path / "one", make, 1, LogRouting(tmp_path / "one"), **options)
    two = fit(tmp_path / "two", make, 2, LogRouting(tmp_path / "two"), **options)
    assert {"score", "routing/vision.0/dead_experts", "routing/dropped_in_training"} <= one["logged"].keys()
    for own in two:
        assert own["logged"] == {name: pytest.approx(value, abs=1e-6) for name, value in one["logged"].items()}
    tables = [json.loads((tmp_path / each / "routing.json").read_text())["places"] for each in ("one", "two")]
    assert tables[0].keys() == tables[1].keys()
    for place in tables[0]:
        one_load, two_load = (np.array(table[place]["load_by_task"], dtype=float) for table in tables)
        assert np.allclose(one_load, two_load, atol=1e-6, equal_nan=True)  # no row of a blind task reaches a picture
