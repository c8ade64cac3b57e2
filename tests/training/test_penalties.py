"""Objectives on routings: the whole batch counts, whatever the processes, accumulated batches and checkpointing."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from moadapt.adapters import LoRA
from moadapt.objectives import LoadBalance, MutualInformation, RoutingObjective
from moadapt.registry import OBJECTIVES
from moadapt.routed import routed_at
from moadapt.router import RouterSpec, RoutingContext
from moadapt.routing import Routing
from moadapt.training import MixedTasks, MixtureModule, Optimization
from moadapt.training.penalties import routing_values
from moadapt_routers import Softmax, Switch, TopK
from tests.conformance.canonical import TASKS, make
from tests.models import llava_batch, padded
from tests.training import toy
from tests.training.runs import trainer

ROUTERS = [TopK(k=2, scope="token", per="layer"), Switch(scope="sequence", per="layer")]
OBJECTIVES_ON_ROUTINGS = [
    pytest.param(part, router, id=f"{router.scope}-{name}")
    for name, part in OBJECTIVES
    if issubclass(part, RoutingObjective)
    for router in ROUTERS
    if router.scope in part.scopes
]


@dataclass(frozen=True, kw_only=True)
class Gates(Softmax):
    """Gates that open one by one, so that their weights add up to anything."""

    sums_to_one: ClassVar[bool] = False

    def choose(self, logits: Tensor, context: RoutingContext, *, training: bool) -> Routing:
        return Routing(logits.sigmoid(), logits.shape[-1])


def suiting(objective: RoutingObjective, router: RouterSpec) -> RouterSpec:
    """The router, or gates in its scope where the objective refuses it."""
    try:
        objective.check(make(router), TASKS)
    except ValueError:
        return Gates(scope=router.scope, per=router.per)
    return router


class Recording(MixtureModule):
    """Writes the gradients of the first step."""

    result = Path()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if self.global_step == 0 and self.global_rank == 0:
            named = {name: p.grad.clone() for name, p in self.mixture.named_adapter_parameters() if p.grad is not None}
            torch.save(named, self.result)


def first_gradients(
    folder: Path, base: str, objectives: list[Any], router: RouterSpec, **options: Any
) -> dict[str, Tensor]:
    """Train one step in float64 and return its gradients."""
    torch.manual_seed(0)
    experts = {name: LoRA(rank=2) for name in ("small", "large", "spare")}
    checkpointing = options.pop("checkpointing", False)
    module = Recording(
        base, experts, LoRA(rank=2), router, objectives=objectives, optimization=Optimization(),
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    module.result = folder / "gradients.pt"
    module.configure_model()
    for parameter in module.roles():
        torch.nn.init.normal_(parameter, std=0.2)
    tasks = MixedTasks(base, toy.toy_tasks(folder, rows=(6, 6)), batch_size=options.pop("rows", 4))
    trainer(folder, **{"max_steps": 1, "limit_val_batches": 0, "precision": "64-true", **options}).fit(
        module, datamodule=tasks
    )
    found: dict[str, Tensor] = torch.load(module.result, weights_only=True)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        rounding = 1e-6 * float(gradient.abs().max())  # routers compute in float32
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=rounding, msg=name)


@pytest.mark.parametrize(("objective", "router"), OBJECTIVES_ON_ROUTINGS)
def test_processes_and_checkpointing_change_no_gradient(
    tmp_path: Path, base: str, objective: type[RoutingObjective], router: RouterSpec
) -> None:
    given = [objective(weight=2.0)]
    router = suiting(given[0], router)
    whole = first_gradients(tmp_path, base, given, router)
    plain = first_gradients(tmp_path, base, [], router)
    moved = [name for name, gradient in whole.items() if not torch.allclose(gradient, plain[name], rtol=1e-6)]
    assert any("routers" in name for name in moved)
    assert_same(first_gradients(tmp_path, base, given, router, checkpointing=True), whole)
    two = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    assert_same(first_gradients(tmp_path, base, given, router, **two), whole)


@pytest.mark.parametrize(("objective", "router"), OBJECTIVES_ON_ROUTINGS)
def test_padding_does_not_count_and_answers_where_declared(
    objective: type[RoutingObjective], router: RouterSpec
) -> None:
    mixture, batch = make(suiting(objective(), router)), llava_batch()

    def value(**inputs: Any) -> Tensor:
        with torch.no_grad(), mixture.observe() as observed:
            mixture(**inputs, task=TASKS)
        utilities = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
        return routing_values({"it": objective()}, mixture, observed, lambda own: own, utilities=utilities)["it"]

    expected = value(**batch)
    for side in ("left", "right"):
        torch.testing.assert_close(value(**padded(batch, 3, side)), expected, rtol=1e-4, atol=1e-6)
    answers = batch["labels"] != -100
    other = {**batch, "input_ids": torch.where(answers, (batch["input_ids"] + 7) % 20 + 6, batch["input_ids"])}
    same = torch.isclose(value(**other), expected, rtol=1e-4, atol=1e-6)
    assert bool(same) is not (objective.counts_answers and mixture.spec.router.scope == "token")


def test_a_mixture_without_routing_has_nothing_to_judge() -> None:
    with pytest.raises(ValueError, match="nothing is routed in this mixture; leave out LoadBalance"):
        routing_values({"it": LoadBalance()}, make(None), [], lambda own: own)


def test_objectives_know_tasks_that_no_expert_is_named_after(tmp_path: Path, base: str) -> None:
    experts = {name: LoRA(rank=2) for name in ("first", "second")}
    module = MixtureModule(base, experts, None, TopK(k=2), objectives=[MutualInformation(weight=0.0)])
    fit = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    fit.fit(module, datamodule=MixedTasks(base, toy.toy_tasks(tmp_path, rows=(6, 6)), batch_size=6))
    assert -math.log(2) <= fit.callback_metrics["objective/mutual_information"].item() < 0


def test_what_is_routed_is_laid_out_input_by_input() -> None:
    mixture, batch = make(TopK(k=2, scope="token", per="tower")), llava_batch()
    with torch.no_grad(), mixture.observe() as observed:
        mixture(**batch, task=TASKS)
    here = {each.place: routed_at(each, mixture.experts, mixture.tasks) for each in observed}
    text, patches = here["language"], here["vision"]
    rows, tokens = batch["input_ids"].shape
    prompt = (batch["labels"] == -100) & (batch["attention_mask"] == 1)
    assert text.weights.shape == (rows * tokens, 3)
    assert torch.equal(text.counted.view(rows, tokens) > 0, prompt)
    assert text.tasks is not None
    assert torch.equal(text.tasks.view(rows, tokens)[:, 0], torch.arange(3))
    assert patches.counted.all()
    assert (text.chosen.sum(-1) == 2).all()
    assert text.task_experts.tolist() == [0, 1, 2]
