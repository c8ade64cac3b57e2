import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from moadapt.sampling import Proportional
from moadapt.task import BadExample, Defect, Example
from moadapt.training.collate import Collator
from moadapt.training.loaders import EvaluationLoader, Rows, TrainLoader
from moadapt.training.order import MixedOrder
from tests.training import toy


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    return Rows({name: task.read("train")[0] for name, task in toy.toy_tasks(tmp_path, rows=(7, 5)).items()})


def train(rows: Rows, workers: int = 0, process: int = 0, processes: int = 1) -> TrainLoader:
    order = MixedOrder(rows.sizes, 4, Proportional(), seed=1)
    return TrainLoader(rows, order, Collator(toy.processor(), seed=1, answers=True), workers, process, processes)


def seen(batches: Any) -> list[list[int]]:
    return [batch.rows.tolist() for batch in batches]


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_share_the_batches_of_one(rows: Rows, processes: int) -> None:
    whole = seen(train(rows))
    parts = [seen(train(rows, process=process, processes=processes)) for process in range(processes)]
    assert [[row for part in step for row in part] for step in zip(*parts, strict=True)] == whole
    assert all(max(map(len, step)) - min(map(len, step)) <= 1 for step in zip(*parts, strict=True))


def test_a_batch_with_fewer_rows_than_processes_is_refused(rows: Rows) -> None:
    with pytest.raises(ValueError, match=r"batch_size is 4.*5 processes; give at least one row a process"):
        train(rows, processes=5)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("done", [0, 1, 3, 5])
def test_a_loader_goes_on_where_its_state_was_taken(rows: Rows, done: int, workers: int) -> None:
    loader = train(rows)
    whole = [batch for _ in range(3) for batch in loader]
    first = train(rows, workers)
    for _ in range(2):
        for batch in first:
            if batch.step + 1 == done:
                break
        if first.steps_done == done:
            break
    again = train(rows, workers)
    if done:
        again.load_state_dict(first.state_dict())
    rest = [batch for _ in range(3) for batch in again]
    assert next(batch.step for batch in rest) == done
    for mine, theirs in zip(rest, whole[done:], strict=False):
        assert (mine.step, mine.rows.tolist()) == (theirs.step, theirs.rows.tolist())
        assert all(torch.equal(mine.inputs[name], theirs.inputs[name]) for name in theirs.inputs)


def test_the_state_is_seed_epoch_and_step_and_what_was_drawn(rows: Rows) -> None:
    loader = train(rows)
    for _ in range(2):
        list(loader)
    last = next(iter(loader))
    state = loader.state_dict()
    waits = state.pop("waits")
    first = last.task_names.count("small")
    drawn = {"small": 14 + first, "large": 10 + 4 - first}
    data = {"sizes": {"small": 7, "large": 5}, "sampler": "Proportional()", "one_task": False, "budget": None}
    numbers = {"seed": 1, "epoch": 2, "step": 1, "steps_per_epoch": 3, "batch_size": 4}
    assert state == {**data, **numbers, "drawn": drawn, "known": {}}
    assert {name: type(wait) for name, wait in waits.items()} == {"small": float, "large": float}


def test_a_state_of_other_data_is_refused(rows: Rows) -> None:
    loader = train(rows)
    with pytest.raises(ValueError, match="seed was 9 and is 1"):
        loader.load_state_dict({**loader.state_dict(), "seed": 9})
    with pytest.raises(ValueError, match=r"tasks were \['small'\] and are \['small', 'large'\]"):
        loader.load_state_dict({**loader.state_dict(), "sizes": {"small": 3}})


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_takes_every_row_once_on_all_processes_together(rows: Rows, processes: int) -> None:
    collator = Collator(toy.processor(), seed=1, answers=False)
    loaders = [EvaluationLoader(rows, collator, 2, 0, process, processes) for process in range(processes)]
    batches = [list(loader) for loader in loaders]
    assert len({len(loader) for loader in loaders} | {len(own) for own in batches}) == 1
    counted = [row for own in batches for batch in own if not batch.spare for row in batch.rows.tolist()]
    assert sorted(counted) == list(range(12))
    assert all(len(batch) for own in batches for batch in own)
    assert all(len(set(batch.task_names)) <= 1 for own in batches for batch in own)


def test_evaluation_lets_tasks_take_turns(rows: Rows) -> None:
    loader = EvaluationLoader(rows, Collator(toy.processor(), seed=1, answers=False), 1, 0, 0, 1)
    first_half = [batch.task_names[0] for batch in loader][:6]
    assert 2 <= first_half.count("large") <= 3


class ReadLate(Sequence[Example]):
    """Rows of which some turn out to be unusable when they are read."""

    def __init__(self, examples: Sequence[Example], broken: set[int]) -> None:
        self.examples, self.broken = examples, broken

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: Any) -> Any:
        if row in self.broken:
            raise Defect(BadExample(Path("shard.tar"), f"sample {row}", "it has no picture"))
        return self.examples[row]


def late(tmp_path: Path, broken: set[int], *, skip: bool) -> Rows:
    tasks = toy.toy_tasks(tmp_path, rows=(7, 5))
    return Rows({name: ReadLate(task.read("train")[0], broken) for name, task in tasks.items()}, skip=skip)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_that_cannot_be_used_when_they_are_read_are_skipped(tmp_path: Path, workers: int) -> None:
    loader = train(late(tmp_path, {1, 4}, skip=True), workers)
    assert sorted(row for batch in seen(loader) for row in batch) == [0, 2, 3, 5, 6, 7, 9, 10]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_used_when_it_is_read_stops_training_with_its_name(tmp_path: Path, workers: int) -> None:
    before = multiprocessing.active_children()
    with pytest.raises(ValueError, match=r"shard\.tar: sample 4: it has no picture.*on_bad_example: skip") as raised:
        seen(train(late(tmp_path, {4}, skip=False), workers))
    left = [child for child in multiprocessing.active_children() if child not in before]
    assert not left, f"though {raised} still holds their loader"


def test_a_step_without_any_usable_row_stops_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row of step 0 can be used"):
        seen(train(late(tmp_path, set(range(7)), skip=True)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than the machine has cores
@pytest.mark.parametrize("rows", [(13, 5), (64, 3), (9, 9)])
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 3), (2, 2), (3, 1)])
def test_an_epoch_shows_every_row_once_over_processes_and_workers(
    tmp_path: Path, rows: tuple[int, int], processes: int, workers: int
) -> None:
    """Up to the rows that fill no whole batch: those open the next epoch."""
    read = Rows({name: task.read("train")[0] for name, task in toy.toy_tasks(tmp_path, rows=rows).items()})
    loaders = []
    for process in range(processes):
        order = MixedOrder(read.sizes, 6, Proportional(), seed=1)
        collator = Collator(toy.processor(), seed=1, answers=True)
        loaders.append(TrainLoader(read, order, collator, workers, process, processes))
    epochs = [[row for loader in loaders for batch in seen(loader) for row in batch] for _ in range(2)]
    assert len(set(epochs[0])) == len(epochs[0]) == sum(rows) // 6 * 6
    assert set(epochs[0]) | set(epochs[1]) == set(range(sum(rows)))


UNFINISHED = """
import sys
from pathlib import Path
from moadapt.training.collate import Collator
from moadapt.training.loaders import EvaluationLoader, Rows
from tests.training import toy
rows = Rows({name: task.read("train")[0] for name, task in toy.toy_tasks(Path(sys.argv[1])).items()})
held = iter(EvaluationLoader(rows, Collator(toy.processor(), seed=1, answers=False), 1, 1, 0, 1))
next(held)
"""


def test_a_process_ends_though_something_holds_an_unfinished_loader_with_a_worker(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    command = [sys.executable, "-c", UNFINISHED, str(tmp_path)]
    subprocess.run(command, env=environment, check=True, timeout=120, start_new_session=True)


def test_a_process_without_usable_rows_gets_a_spare_one_of_the_others(tmp_path: Path) -> None:
    """Both when it trains and when it evaluates; the rows that count are those of one process."""
    read = late(tmp_path, {0, 2, 4}, skip=True)
    whole = seen(train(read))
    parts = [list(train(read, process=process, processes=4)) for process in range(4)]
    assert any(batch.spare for own in parts for batch in own)
    counted = [[row for b in step if not b.spare for row in b.rows.tolist()] for step in zip(*parts, strict=True)]
    assert counted == whole
    collator = Collator(toy.processor(), seed=1, answers=False)
    batches = [list(EvaluationLoader(read, collator, 1, 0, process, 2)) for process in range(2)]
    assert all(len({len(batch) > 0 for batch in step}) == 1 for step in zip(*batches, strict=True))
    usable = [row for own in batches for b in own if not b.spare for row in b.rows.tolist()]
    assert sorted(usable) == [1, 3, 5, 6, 8, 10]
