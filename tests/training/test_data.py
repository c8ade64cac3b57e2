from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from moadapt.adapters import LoRA
from moadapt.task import Dataset, Task
from moadapt.training import MixedTasks, MixtureModule
from tests.training import toy
from tests.training.runs import Watch, trainer


@dataclass(frozen=True)
class Made(Dataset):
    """Writes a file and knows its tasks."""

    root: Path

    def prepare(self) -> Mapping[str, Task]:
        (self.root / "written").touch()
        return toy.toy_tasks(self.root)


def test_bad_entries_are_raised_before_training_with_the_first_ten_and_their_count(tmp_path: Path, base: str) -> None:
    data = MixedTasks(base, toy.toy_tasks(tmp_path, broken=4))
    with pytest.raises(ValueError, match="16 entries cannot be used") as caught:
        data.setup("fit")
    lines = str(caught.value).splitlines()
    assert lines[1].strip() == f"small, train: {tmp_path}/small/train.json: row 0: has no picture"
    assert sum("has no picture" in line for line in lines) == 10
    assert "and 6 more" in lines[11]


def test_bad_entries_are_skipped_and_counted_where_asked(
    tmp_path: Path, base: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = MixedTasks(base, toy.toy_tasks(tmp_path, broken=1), batch_size=5, on_bad_example="skip")
    data.setup("fit")
    assert {where: len(bad) for where, bad in data.skipped.items()} == dict.fromkeys(
        ["small, train", "large, train", "small, validation", "large, validation"], 1
    )
    assert "4 entries cannot be used; skipped" in caplog.text
    assert len(data.train_dataloader()) == 10 // 5


@pytest.mark.parametrize("given", ["both", "neither"])
def test_tasks_and_dataset_exclude_each_other(tmp_path: Path, base: str, given: str) -> None:
    both = {"tasks": toy.toy_tasks(tmp_path), "dataset": Made(tmp_path)} if given == "both" else {}
    with pytest.raises(ValueError, match=f"{given} of tasks and dataset"):
        MixedTasks(base, **both)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size", "num_workers", "seed"])
def test_numbers_out_of_range_are_refused(tmp_path: Path, base: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is -1; give at least [01]$"):
        MixedTasks(base, toy.toy_tasks(tmp_path), **{name: -1})  # type: ignore[arg-type]


def test_a_dataset_writes_its_files_and_gives_its_tasks(tmp_path: Path, base: str) -> None:
    data = MixedTasks(base, dataset=Made(tmp_path), batch_size=2)
    data.prepare_data()
    assert (tmp_path / "written").exists()
    data.setup("test")
    assert list(data.tasks) == ["small", "large"]
    assert sum(len(batch) for batch in data.test_dataloader()) == 10


def test_a_task_without_rows_is_refused(tmp_path: Path, base: str) -> None:
    data = MixedTasks(base, toy.toy_tasks(tmp_path, rows=(3, 0)))
    with pytest.raises(ValueError, match=r"'large' has no usable rows in its train split"):
        data.setup("fit")


def test_the_next_loader_starts_at_a_loaded_state_and_the_one_after_it_anew(tmp_path: Path, base: str) -> None:
    data = MixedTasks(base, toy.toy_tasks(tmp_path), batch_size=2)
    data.setup("fit")
    iterator = iter(data.train_dataloader())
    for _ in range(3):
        next(iterator)
    state = data.state_dict()
    fourth = next(iterator)
    data.load_state_dict(state)
    assert next(iter(data.train_dataloader())).rows.tolist() == fourth.rows.tolist()
    assert next(iter(data.train_dataloader())).step == 0


@pytest.mark.parametrize("limit", [2, 0.5])
def test_passes_that_are_cut_short_are_even_and_go_on_in_the_data(tmp_path: Path, base: str, limit: float) -> None:
    """Of five steps of an epoch each takes two, three times, as the schedule counts on."""
    data, watch = MixedTasks(base, toy.toy_tasks(tmp_path), batch_size=2), Watch()
    module = MixtureModule(base, shared=LoRA(rank=1))
    fit = trainer(tmp_path, watch, max_epochs=3, limit_train_batches=limit, limit_val_batches=0)
    fit.fit(module, datamodule=data)
    assert [epoch for _, epoch, *_ in watch.trained] == [0, 0, 1, 1, 2, 2]
    assert fit.global_step == fit.estimated_stepping_batches
    assert fit.lr_scheduler_configs[0].scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-12)
    assert sorted(row for _, _, _, *rows in watch.trained[:5] for row in rows) == list(range(10))
