"""Routing regret: losses against the base's own, row by row, and agreement against the routings themselves."""

import pytest
import torch

from moadapt import Mixture, RouterSpec, attach
from moadapt.adapters import LoRA
from moadapt.routing_regret import routing_regret
from moadapt_routers import ByTask, Constant, Softmax
from tests.models import llava_batch, randomize, rows_of, tiny_llava

NAMES = ("a", "b", "c")


def routed(router: RouterSpec) -> Mixture:
    mixture = attach(tiny_llava(), experts={name: LoRA(rank=2) for name in NAMES}, router=router)
    randomize(mixture)
    return mixture


def loss_of(mixture: Mixture, row: int, expert: str | None = None, task: str | None = None) -> float:
    """The base's own loss of one row."""
    batch = rows_of(llava_batch(4), row)
    with torch.no_grad():
        if expert is None:
            return float(mixture(**batch, task=task).loss)
        with mixture.override({expert: 1.0}):
            return float(mixture(**batch).loss)


def test_losses_are_those_of_each_expert_alone_and_of_the_routing() -> None:
    mixture = routed(Softmax()).eval()
    tasks = ["a", "b", "a", "a"]
    found = {each.task: each for each in routing_regret(mixture, {**llava_batch(4), "task": tasks})}
    assert list(found) == ["a", "b"]
    for name, rows in (("a", [0, 2, 3]), ("b", [1])):
        assert found[name].rows == len(rows)
        alone = {row: [loss_of(mixture, row, expert) for expert in NAMES] for row in rows}
        mean = sum(loss_of(mixture, row) for row in rows) / len(rows)
        assert found[name].predicted == pytest.approx(mean, rel=1e-4)
        assert found[name].oracle == pytest.approx(sum(alone[r][NAMES.index(name)] for r in rows) / len(rows), rel=1e-4)
        assert found[name].worst == pytest.approx(sum(max(alone[row]) for row in rows) / len(rows), rel=1e-4)


def test_the_oracle_itself_has_no_regret_and_agrees() -> None:
    found = routing_regret(routed(ByTask()), [{**llava_batch(), "task": list(NAMES)}, {**llava_batch(), "task": "b"}])
    assert [each.rows for each in found] == [1, 4, 1]
    for each in found:
        assert each.agreement == 1.0
        assert each.regret == pytest.approx(0.0, abs=1e-5)


def test_agreement_is_the_share_of_places_where_the_own_expert_weighs_most() -> None:
    mixture, batch = routed(Softmax(per="layer")).eval(), llava_batch()
    with torch.no_grad(), mixture.trace() as trace:
        mixture(**batch)
    best = torch.stack([weights[0][:, 0, 0].argmax(-1) for weights in trace.routings.values()])
    found = routing_regret(mixture, {**batch, "task": list(NAMES)})
    assert [each.agreement for each in found] == pytest.approx(
        [float((best[:, row] == row).float().mean()) for row in range(3)]
    )


def test_tokens_count_where_they_are_prompt_and_weights_of_zero_agree_with_nothing() -> None:
    mixture, batch = routed(Softmax(scope="token")).eval(), llava_batch()
    with torch.no_grad(), mixture.trace() as trace:
        mixture(**batch)
    prompt = (batch["labels"] == -100).float()[:, :, None]
    best = torch.stack([(w[0][:, :, 0] * prompt).sum(1).argmax(-1) for w in trace.routings.values()])
    found = routing_regret(mixture, {**batch, "task": list(NAMES)})
    assert [each.agreement for each in found] == pytest.approx(
        [float((best[:, row] == row).float().mean()) for row in range(3)]
    )
    none = routing_regret(routed(Constant(weights=(0.0, 0.0, 0.0))), {**batch, "task": list(NAMES)})
    assert [each.agreement for each in none] == [0.0, 0.0, 0.0]


def test_rows_without_answers_or_tasks_are_refused() -> None:
    mixture, batch = routed(Softmax()), llava_batch()
    with pytest.raises(ValueError, match="held-out rows need their answers and tasks"):
        routing_regret(mixture, batch)
    labels = batch.pop("labels")
    with pytest.raises(ValueError, match="give batches with labels and task"):
        routing_regret(mixture, {**batch, "task": "a"})
    with pytest.raises(ValueError, match="got 2 tasks for 3 rows; give one name, or one a row"):
        routing_regret(mixture, {**batch, "labels": labels, "task": ["a", "b"]})
