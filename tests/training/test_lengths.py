"""Batches by tokens: what is measured is what batches have, and every process keeps to its part."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from moadapt.sampling import Uniform
from moadapt.task import BadExample, Defect, Example
from moadapt.training import MixedTasks
from moadapt.training.collate import Collator, Item
from moadapt.training.lengths import row_lengths
from moadapt.training.loaders import Rows, TrainLoader
from moadapt.training.order import Budget, MixedOrder
from tests.training import toy
from tests.training.runs import module, trainer


class Wordy(Sequence[Example]):
    """Rows of a task with longer prompts and several answers; some cannot be read."""

    def __init__(self, examples: Sequence[Example], broken: Sequence[int] = ()) -> None:
        self.examples, self.broken = examples, broken

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: Any) -> Any:
        if row in self.broken:
            raise Defect(BadExample(Path("shard.tar"), f"sample {row}", "it has no picture"))
        given = self.examples[row]
        answers = tuple("yes" * (1 + each) for each in range(row % 3 + 1))
        return Example(given.pictures, given.prompt * (row + 1), answers, given.reference, given.entry)


def rows(folder: Path, broken: Sequence[int] = ()) -> Rows:
    tasks = toy.toy_tasks(folder, rows=(7, 5))
    return Rows({name: Wordy(task.read("train")[0], broken) for name, task in tasks.items()}, skip=bool(broken))


def collator(**options: Any) -> Collator:
    return Collator(toy.processor(), seed=1, answers=True, **options)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("decoder_start", [None, 1], ids=["behind", "apart"])
def test_a_length_is_that_of_the_row_alone_with_its_longest_answer(
    tmp_path: Path, decoder_start: int | None, workers: int
) -> None:
    read, made = rows(tmp_path), collator(decoder_start=decoder_start)
    lengths = row_lengths(read, made, workers)
    for row, (name, example) in enumerate((n, e) for n, t in zip(read.names, read.tasks, strict=True) for e in t):
        alone = [made([Item(name, example, row, turn)]).inputs for turn in range(len(example.answers))]
        sides = ("input_ids", "decoder_input_ids")
        assert lengths[row] == max(sum(each[side].shape[1] for side in sides if side in each) for each in alone)
    assert len(set(lengths.tolist())) > 5


def test_processes_measure_every_row_once_and_leave_out_what_is_skipped(tmp_path: Path) -> None:
    read = rows(tmp_path, broken=(2,))
    whole = row_lengths(read, collator(), 0)
    parts = torch.stack([row_lengths(read, collator(), 0, process, 3) for process in range(3)])
    assert torch.equal(parts.sum(dim=0), whole)
    assert ((parts > 0).sum(dim=0) == (whole > 0)).all()
    assert whole.eq(0).nonzero().flatten().tolist() == [2, 7 + 2]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("one_task", [False, True])
def test_no_process_gets_more_than_its_part_of_the_tokens(tmp_path: Path, processes: int, one_task: bool) -> None:
    read, made = rows(tmp_path), collator()
    lengths = row_lengths(read, made, 0)
    tokens = 4 * int(lengths.max()) + 200
    budget = Budget(tokens, 4, lengths.numpy())
    order = MixedOrder(read.sizes, 100, Uniform(), 0, one_task=one_task, budget=budget)
    for process in range(processes):
        loader = TrainLoader(read, order, made, 0, process, processes)
        found = [batch.inputs["input_ids"].shape for _ in range(6) for batch in loader]
        assert max(count * length for count, length in found) <= tokens / processes
        assert len({count for count, _ in found}) > 1


def test_training_by_tokens(tmp_path: Path, base: str) -> None:
    tasks = toy.toy_tasks(tmp_path, rows=(12, 8))
    data = MixedTasks(base, tasks, batch_size=20, batch_tokens=100, batch_multiple=2, sampling=Uniform())
    data.setup("fit")
    lengths = row_lengths(Rows({name: task.read("train")[0] for name, task in tasks.items()}), collator(), 0)
    assert 100 // lengths.max() // 2 * 2 < 100 // lengths.min()
    fit = trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    fit.fit(module(base), datamodule=data)
    assert fit.global_step == 2 * len(data.train_dataloader())
    assert [batch.labels.numel() <= 100 for batch in data.train_dataloader()] == [True] * len(data.train_dataloader())


def test_a_budget_below_the_longest_rows_is_refused_before_training(tmp_path: Path, base: str) -> None:
    data = MixedTasks(base, toy.toy_tasks(tmp_path), batch_tokens=20)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"batch_tokens is 20, and 8 rows \(batch_multiple\) of the longest row"):
        data.train_dataloader()
