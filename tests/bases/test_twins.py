"""Twins of every class train and write with routed adapters, on batches that the collator makes."""

import inspect
from typing import Any

import pytest
import torch

from moadapt import Mixture, Placement, attach
from moadapt.adapters import LoRA
from moadapt.training.batch import IGNORED, Batch
from moadapt.training.loss import answer_logits, row_losses
from moadapt_routers import ByTask
from tests.bases.rows import WRITERS, collated, items
from tests.bases.twins import Twin, twin

ANSWERS = ["red", "a green one", "blue"]
TASKS = ["a", "b"]


def routed(of: Twin) -> Mixture:
    """A mixture with two LoRAs."""
    kinds = ("attention", "mlp")
    experts = {task: LoRA(rank=4) for task in TASKS}
    return attach(of.model, experts=experts, router=ByTask(), placement=Placement(kinds=kinds))


def tasks_of(batch: Batch) -> list[str]:
    return [TASKS[row % 2] for row in range(len(batch))]


def losses(model: Any, of: Twin, batch: Batch, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    keeps = "logits_to_keep" in inspect.signature(of.model.forward).parameters
    return row_losses(answer_logits(model, batch, keeps, **options), batch)


@pytest.mark.parametrize("name", WRITERS)
def test_the_loss_is_that_of_the_base(name: str) -> None:
    of = twin(name)
    batch = collated(of, items(name, ANSWERS), answers=True)
    assert batch.labels is not None
    with torch.no_grad():
        summed, counts = losses(of.model, of, batch)
        expected = of.model(**batch.inputs, labels=batch.labels).loss
    assert counts.tolist() == (batch.labels != IGNORED).sum(dim=1).tolist()
    torch.testing.assert_close(summed.sum() / counts.sum(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WRITERS)
def test_a_step_lowers_the_loss_of_every_row(name: str) -> None:
    of = twin(name)
    batch = collated(of, items(name, ANSWERS), answers=True)
    mixture = routed(of)
    told: dict[str, Any] = {"task": tasks_of(batch), "prompt_mask": batch.prompt_mask}
    before, _ = losses(mixture, of, batch, **told)
    optimizer = torch.optim.SGD([p for p in mixture.parameters() if p.requires_grad], lr=1e-2)
    before.sum().backward()
    optimizer.step()
    after, _ = losses(mixture, of, batch, **told)
    assert bool((after < before).all())


@pytest.mark.parametrize("name", WRITERS)
def test_rows_of_different_tasks_are_answered_as_by_their_tasks_alone(name: str) -> None:
    of = twin(name)
    batch = collated(of, items(name, ANSWERS), answers=False)
    mixture = routed(of).eval()
    for parameter in mixture.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    together = written(mixture, batch, tasks_of(batch))
    for row, task in enumerate(tasks_of(batch)):
        assert torch.equal(together[row], written(mixture, batch, task)[row])
    assert not torch.equal(together, written(mixture, batch, "a"))


def written(mixture: Mixture, batch: Batch, task: str | list[str]) -> torch.Tensor:
    length = 6
    found = mixture.generate(
        **batch.inputs, task=task, do_sample=False, min_new_tokens=length, max_new_tokens=length, pad_token_id=0
    )
    assert found.shape[0] == len(batch)
    return found[:, -length:]
