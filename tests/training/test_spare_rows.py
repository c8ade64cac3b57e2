"""A process whose rows of a step cannot be used trains along, and the step is that of one process."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moadapt.adapters import LoRA
from moadapt.objectives import LoadBalance
from moadapt.task import BadExample, Defect, Example
from moadapt.training import MixedTasks, MixtureModule, Optimization
from moadapt.training.module import TaskModule
from moadapt_routers import TopK
from tests.training import toy
from tests.training.processes import assert_same, fit, randomized


class ReadLate(Sequence[Example]):
    """Rows of which every third turns out to be unusable when it is read."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: Any) -> Any:
        if row % 3 == 0:
            raise Defect(BadExample(Path("shard.tar"), f"sample {row}", "it has no picture"))
        return self.examples[row]


class Late(toy.Colour):
    """Reads its rows when they are drawn."""

    def read(self, split: str) -> Any:
        examples, bad = super().read(split)
        return ReadLate(examples), bad


def made(base: str, folder: Path) -> tuple[TaskModule, MixedTasks]:
    experts = {name: LoRA(rank=2) for name in ("one", "two", "three")}
    settings = Optimization(learning_rate=1e-2, schedule="constant", warmup=0)
    module = MixtureModule(
        base, experts, LoRA(rank=2), TopK(k=1), optimization=settings, objectives=[LoadBalance(weight=1.0)]
    )
    tasks = {"late": Late(root=str(folder / "late"), rows=12)}
    return randomized(module), MixedTasks(base, tasks, batch_size=2, on_bad_example="skip")


def test_a_step_is_that_of_one_process_though_one_has_no_usable_row(tmp_path: Path, base: str) -> None:
    make = partial(made, base, tmp_path)
    exact: dict[str, Any] = {"precision": "64-true", "max_steps": 5}
    [one] = fit(tmp_path / "one", make, 1, **exact)
    two = fit(tmp_path / "two", make, 2, **exact)
    assert sum(map(len, one["tasks"])) < sum(len(tasks) for own in two for tasks in own["tasks"]), "some are spare"
    assert_same(two, one, 1e-6)
