import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moadapt.training.collate import Collator
from moadapt.training.loaders import EvaluationLoader, Rows, TrainLoader
from moadapt.training.order import MixedOrder
from tests.training import toy


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    return Rows({name: task.read("train")[0] for name, task in toy.toy_tasks(tmp_path, rows=(7, 5)).items()})


def train(rows: Rows, workers: int = 0, process: int = 0, processes: int = 1) -> TrainLoader:
    order = MixedOrder(rows.sizes, 4, "proportional", seed=1)
    return TrainLoader(rows, order, Collator(toy.processor(), seed=1, answers=True), workers, process, processes)


def seen(batches: Any) -> list[list[int]]:
    return [batch.rows.tolist() for batch in batches]


def test_processes_share_the_batches_of_one(rows: Rows) -> None:
    whole = seen(train(rows))
    halves = [seen(train(rows, process=process, processes=2)) for process in range(2)]
    assert [first + second for first, second in zip(*halves, strict=True)] == whole


def test_a_batch_that_cannot_be_shared_evenly_is_refused(rows: Rows) -> None:
    with pytest.raises(ValueError, match=r"batch_size is 4.*multiple of 3"):
        train(rows, processes=3)


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


def test_the_state_is_seed_epoch_and_step(rows: Rows) -> None:
    loader = train(rows)
    for _ in range(2):
        list(loader)
    next(iter(loader))
    assert loader.state_dict() == {"seed": 1, "epoch": 2, "step": 1, "steps_per_epoch": 3}


def test_a_state_of_other_data_is_refused(rows: Rows) -> None:
    loader = train(rows)
    with pytest.raises(ValueError, match="seed was 9 and is 1"):
        loader.load_state_dict({**loader.state_dict(), "seed": 9})


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_takes_every_row_once_on_all_processes_together(rows: Rows, processes: int) -> None:
    collator = Collator(toy.processor(), seed=1, answers=False)
    loaders = [EvaluationLoader(rows, collator, 2, 0, process, processes) for process in range(processes)]
    batches = [list(loader) for loader in loaders]
    assert len({len(loader) for loader in loaders} | {len(own) for own in batches}) == 1
    assert sorted(row for own in batches for batch in own for row in batch.rows.tolist()) == list(range(12))
    assert all(len(set(batch.task_names)) <= 1 for own in batches for batch in own)


def test_evaluation_lets_tasks_take_turns(rows: Rows) -> None:
    loader = EvaluationLoader(rows, Collator(toy.processor(), seed=1, answers=False), 1, 0, 0, 1)
    first_half = [batch.task_names[0] for batch in loader][:6]
    assert 2 <= first_half.count("large") <= 3


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
