from pathlib import Path
from typing import Any

import pytest

from moadapt.training import KeepLast, MixedTasks
from moadapt.training.kept import LAST
from moadapt.training.run_bar import RunBar
from tests.training import toy
from tests.training.runs import module, trainer


class Noting(RunBar):
    """Notes what the bar says at every step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *rest)
        assert self.progress is not None
        self.said = [(task.description, task.completed, task.total) for task in self.progress.tasks]


@pytest.mark.parametrize("name", ["one LoRA", None])
def test_a_bar_says_the_run_and_counts_all_its_steps(tmp_path: Path, base: str, name: str | None) -> None:
    said = []
    for steps in (2, 5):  # the second goes on where the first stopped
        bar = Noting(name)
        data = MixedTasks(base, toy.toy_tasks(tmp_path, rows=(12, 12)), batch_size=3)
        callbacks = [bar, KeepLast(tmp_path, every_n_steps=1)]
        fit = trainer(tmp_path, *callbacks, max_steps=steps, limit_val_batches=0, enable_progress_bar=True)
        last = tmp_path / LAST
        fit.fit(module(base), datamodule=data, ckpt_path=last if last.is_file() else None, weights_only=True)
        said.append(bar.said)
    texts = [text for ((text, *_), *_) in said]
    assert all(text == name if name else text.startswith("Epoch ") and "/" not in text for text in texts)
    assert [numbers for ((_, *numbers), *_) in said] == [[2, 2], [5, 5]]
