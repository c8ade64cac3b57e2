from pathlib import Path

import pytest
import torch

from moadapt.bases import load_base
from moadapt.training.batch import Batch
from moadapt.training.collate import Collator, Item
from moadapt.training.loss import answer_logits, row_losses
from tests.training import toy


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    tasks = toy.toy_tasks(tmp_path)
    items = [Item(name, task.read("train")[0][row], row) for row in range(2) for name, task in tasks.items()]
    return Collator(toy.processor(), seed=0, answers=True)(items)


@pytest.mark.parametrize("keeps", [True, False], ids=["needed-logits", "all-logits"])
def test_the_sum_over_rows_is_the_loss_that_transformers_computes(batch: Batch, base: str, keeps: bool) -> None:
    model, _ = load_base(base, dtype="float64")
    batch = batch.cast(torch.float64)
    losses, counts = row_losses(answer_logits(model, batch, keeps), batch)
    assert batch.labels is not None
    assert counts.tolist() == (batch.labels != -100).sum(dim=1).tolist()
    expected = model(**batch.inputs, labels=batch.labels).loss
    torch.testing.assert_close(losses.sum() / counts.sum(), expected.double(), rtol=1e-6, atol=0)  # theirs is float32


def test_a_rows_loss_does_not_depend_on_its_company(batch: Batch, base: str) -> None:
    model, _ = load_base(base, dtype="float64")
    batch = batch.cast(torch.float64)
    losses, _ = row_losses(answer_logits(model, batch, True), batch)
    for row in range(len(batch)):
        assert batch.labels is not None
        width = int(batch.inputs["attention_mask"][row].sum())
        inputs = {n: t[row : row + 1, :width] if t.ndim == 2 else t[row : row + 1] for n, t in batch.inputs.items()}
        alone = Batch(
            inputs, batch.task_names[:1], batch.rows[:1], batch.examples[:1], batch.labels[row : row + 1, :width]
        )
        torch.testing.assert_close(row_losses(answer_logits(model, alone, True), alone)[0], losses[row : row + 1])
