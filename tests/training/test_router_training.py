"""Routers in training: routers alone on saved adapters, schedules, sampled choices."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

import moadapt
from moadapt import Routing, RoutingContext, attach
from moadapt.adapters import Hydra, LoRA
from moadapt.bases import load_base
from moadapt.objectives import LoadBalance, Objective, TaskCrossEntropy
from moadapt.ranks import ExplainedVariance, Gates, Importance, RankAllocator
from moadapt.router import RouterSpec
from moadapt.storage import tensors
from moadapt.tracing import Observation
from moadapt.training import KeepLast, MixedTasks, MixtureModule, Optimization, Stopped
from moadapt.training.noise import keyed_noise, shared_noise
from moadapt_routers import ByTask, HardToSoft, MeteoRA, Poly, ReMix, Scenario, Softmax, TopK
from moadapt_routers.remix import ordered_log_prob
from tests.models import randomize
from tests.training import toy
from tests.training.runs import Watch, trainer

SCHEDULES = {"noise": 1.0, "end_noise": 0.1, "temperature": 2.0, "end_temperature": 0.5}


def module_of(base: str, router: RouterSpec, **options: Any) -> MixtureModule:
    torch.manual_seed(0)
    experts = {name: LoRA(rank=2) for name in ("small", "large")}
    settings = Optimization(learning_rate=1e-2, router_learning_rate=1e-2, warmup=0, schedule="constant")
    return MixtureModule(base, experts, LoRA(rank=2), router, optimization=settings, **options)


def fit(
    folder: Path,
    module: MixtureModule,
    *callbacks: Callback,
    steps: int = 3,
    batch_size: int = 4,
    resume: Path | None = None,
    **options: Any,
) -> None:
    data = MixedTasks(module.base, toy.toy_tasks(folder, rows=(6, 6)), batch_size=batch_size)
    given = {"max_steps": steps, "limit_val_batches": 0, **options}
    weights_only = None if resume is None else True
    trainer(folder, *callbacks, **given).fit(module, datamodule=data, ckpt_path=resume, weights_only=weights_only)


@pytest.mark.parametrize("router", [Poly(), Softmax()], ids=["poly", "softmax"])
def test_routers_alone_are_trained_on_saved_adapters(tmp_path: Path, base: str, router: RouterSpec) -> None:
    first = module_of(base, ByTask())
    fit(tmp_path, first)
    first.mixture.save(tmp_path / "saved")
    kept = {name: tensor for name, tensor in first.tensors().items() if name.startswith("adapters/")}
    second = module_of(base, router, start_from=str(tmp_path / "saved"), train="routers")
    second.configure_model()
    began = second.state_dict()
    assert all(torch.equal(began[name], tensor) for name, tensor in kept.items())
    began = {name: tensor.clone() for name, tensor in began.items()}
    fit(tmp_path, second)
    ended = second.state_dict()
    moved = {name for name, tensor in ended.items() if not torch.equal(tensor, began[name])}
    assert moved
    assert all(name.startswith("routers/") for name in moved)
    assert second.mixture.frozen == ("shared", "small", "large")


def test_other_adapters_are_no_start(tmp_path: Path, base: str) -> None:
    first = module_of(base, ByTask())
    first.configure_model()
    first.mixture.save(tmp_path / "saved")
    saved = {"start_from": str(tmp_path / "saved")}
    for adapter, told in ((LoRA(rank=3), "rank"), (LoRA(rank=2, alpha=64), "alpha"), (Hydra(rank=2), "name, ")):
        other = MixtureModule(base, {"small": adapter}, None, ByTask(), **saved)
        with pytest.raises(ValueError, match=f"has adapter 'small' with other settings than it is given: {told}"):
            other.configure_model()
    other = MixtureModule(base, {"other": LoRA(rank=2)}, None, ByTask(), **saved)
    with pytest.raises(ValueError, match="has no adapter 'other'; it has shared, small, large"):
        other.configure_model()
    other = MixtureModule(base, {"small": LoRA(rank=2)}, None, ByTask(), ranks=ExplainedVariance(), **saved)
    with pytest.raises(ValueError, match="start_from gives adapters that have theirs; leave one of the two out"):
        other.configure_model()


def test_routers_are_trained_alone_where_there_is_something_to_train(tmp_path: Path, base: str) -> None:
    experts, train = {"small": LoRA(rank=2)}, {"train": "routers"}
    with pytest.raises(ValueError, match="there is no router; give experts and one"):
        MixtureModule(base, None, LoRA(), start_from="anywhere", **train)
    with pytest.raises(ValueError, match="there is no adapter that was trained; give start_from"):
        MixtureModule(base, experts, None, Poly(), **train)
    with pytest.raises(ValueError, match="train is 'router'; choose all or routers"):
        MixtureModule(base, experts, None, Poly(), train="router")
    attach(load_base(base)[0], experts=experts, router=ByTask()).save(tmp_path / "saved")
    module = MixtureModule(base, experts, None, ByTask(), start_from=str(tmp_path / "saved"), **train)
    with pytest.raises(ValueError, match="ByTask has nothing to train; choose another router"):
        module.configure_model()


@pytest.mark.parametrize("ranks", [Gates(), Importance()], ids=str)
def test_ranks_of_blended_adapters_stay_equal(base: str, ranks: RankAllocator) -> None:
    with pytest.raises(ValueError, match="leaves each adapter ranks of its own, but Poly blends the parameters"):
        module_of(base, Poly(), ranks=ranks)


def test_the_average_of_skills_is_trained_on(tmp_path: Path, base: str) -> None:
    """MHR-mu: one adapter of all, saved, is where the next fit starts."""
    skills = attach(load_base(base)[0], experts={n: LoRA(rank=2) for n in ("a", "b")}, router=Poly())
    randomize(skills)
    one = moadapt.average(skills)
    one.save(tmp_path / "average")
    kept = {name: tensor.clone() for name, tensor in tensors(one).items()}
    module = MixtureModule(base, shared=LoRA(rank=2), start_from=str(tmp_path / "average"))
    module.configure_model()
    began = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert began.keys() == kept.keys()
    assert all(torch.equal(began[name], kept[name]) for name in kept)
    fit(tmp_path, module)
    assert all(not torch.equal(tensor, began[name]) for name, tensor in module.state_dict().items())


class Progress(Callback):
    """Notes what routers are told, and how they decide, in training and in validation."""

    def __init__(self) -> None:
        self.trained: list[Observation] = []
        self.validated: list[Observation] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        mixture = pl_module.mixture
        mixture.context.observers.append(lambda seen: (self.validated, self.trained)[mixture.training].append(seen))


def test_routers_are_told_how_far_training_is(tmp_path: Path, base: str) -> None:
    module, watch = module_of(base, HardToSoft(per="model", k=2, hard=0.5)), Progress()
    fit(tmp_path, module, watch, steps=4, limit_val_batches=1, val_check_interval=1)
    told = [each.seen.progress for each in watch.trained]
    assert [float(share) for share in told if share is not None] == [0.0, 0.25, 0.5, 0.75]
    hard = [bool((each.routing.weights.remainder(1) == 0).all()) for each in watch.trained]
    assert hard == [True, True, False, False]
    assert module.mixture.context.progress is None
    assert len(watch.validated) >= 4
    assert all(each.seen.progress is None for each in watch.validated)


def test_tasks_that_teach_are_needed_in_training_alone(tmp_path: Path, base: str) -> None:
    tasks = toy.toy_tasks(tmp_path)
    module = module_of(base, HardToSoft())
    other = MixedTasks(base, {"small": tasks["small"], "third": tasks["large"]}, batch_size=4)
    with pytest.raises(ValueError, match="goes by task, and there are tasks that it does not know: third"):
        trainer(tmp_path, max_steps=1).fit(module, datamodule=other)
    (scores,) = trainer(tmp_path).validate(module, datamodule=other, verbose=False)
    assert {"small/exact", "third/exact"} <= scores.keys()
    fit(tmp_path, MixtureModule(base, {**module.experts, "general": LoRA(rank=2)}, LoRA(rank=2), HardToSoft()), steps=1)


def test_accumulated_batches_share_the_noise_of_their_step(tmp_path: Path, base: str) -> None:
    seeds = []

    class Noise(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.mixture.context.observers.append(lambda told: seeds.append(told.seen.noise.initial_seed()))

    module = module_of(base, Poly(per="model"))
    fit(tmp_path, module, Noise(), steps=2, accumulate_grad_batches=2)
    first, again, second = seeds  # an epoch of three batches ends with a step
    assert first == again != second
    assert module.mixture.context.noise is None


def test_the_noise_that_processes_share_is_none_of_their_own() -> None:
    with keyed_noise(torch.device("cpu"), 3, 7, 0):  # the first process's
        own = torch.rand(4)
    assert not torch.equal(torch.rand(4, generator=shared_noise(["place"], 3, 7)["place"]), own)


def test_sampled_choices_are_run_and_taught(tmp_path: Path, base: str) -> None:
    """As many passes as samples, and a gradient for routers whose weights are constant."""
    module = module_of(base, ReMix(k=1, samples=3))
    passes: list[Tensor] = []
    gradients: list[Tensor] = []

    class Watch(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            gradients.append(pl_module.mixture.routers[0].linear.bias.grad.clone())

    module.configure_model()
    module.mixture.base.register_forward_pre_hook(lambda *_: passes.append(torch.zeros(())))
    fit(tmp_path, module, Watch(), steps=2)
    assert len(passes) == 2 * 3
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@dataclass(frozen=True, kw_only=True)
class Sure(ReMix):
    """Chooses the most probable experts in training as well, so that choices do not depend on the batch's noise."""

    def choose(self, logits: Tensor, context: RoutingContext, *, training: bool) -> Routing:
        routing = super().choose(logits, context, training=False)
        assert routing.indices is not None
        return replace(routing, log_prob=ordered_log_prob(logits, routing.indices) if training else None)

    def policy_loss(self, log_prob: Tensor, losses: Tensor) -> Tensor:
        return (losses.detach() * log_prob).sum()


def test_accumulated_batches_teach_choices_as_one(tmp_path: Path, base: str) -> None:
    found = []
    for batch_size, accumulated in ((4, 1), (2, 2)):
        module = module_of(base, Sure(k=1))
        module.configure_model()
        fit(tmp_path, module, steps=1, batch_size=batch_size, accumulate_grad_batches=accumulated, precision="64-true")
        found.append([parameter.grad for parameter in module.mixture.routers.parameters()])
    for one, two in zip(*found, strict=True):
        assert one.abs().max() > 0.1
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("router", "objective"), [(ReMix(k=1, **SCHEDULES), LoadBalance()), (HardToSoft(**SCHEDULES), TaskCrossEntropy())]
)
def test_schedules_go_on_where_a_run_was_stopped(
    tmp_path: Path, base: str, router: RouterSpec, objective: Objective
) -> None:
    options: dict[str, Any] = {"steps": 4, "accumulate_grad_batches": 2}

    def module() -> MixtureModule:
        made = module_of(base, router, objectives=[objective])
        made.configure_model()  # while the seed holds
        return made

    whole, stopped, resumed = module(), module(), module()
    fit(tmp_path, whole, **options)
    with pytest.raises(Stopped):
        fit(tmp_path, stopped, Watch(("train", 2)), KeepLast(tmp_path, every_n_steps=1000), **options)
    fit(tmp_path, resumed, KeepLast(tmp_path, every_n_steps=1000), resume=tmp_path / "last.ckpt", **options)
    ends = resumed.state_dict()
    assert all(torch.equal(ends[name], tensor) for name, tensor in whole.state_dict().items())
    assert not all(torch.equal(stopped.state_dict()[name], tensor) for name, tensor in ends.items())


def test_sampled_choices_need_no_luck_to_be_repeated(tmp_path: Path, base: str) -> None:
    """The same seed gives the same training, with and without gradient checkpointing."""
    ends = []
    for options in ({}, {}, {"gradient_checkpointing": True}):
        module = module_of(base, ReMix(k=1), **options)
        fit(tmp_path, module, precision="64-true")
        ends.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
    for name, tensor in ends[0].items():
        assert torch.equal(ends[1][name], tensor)
        torch.testing.assert_close(ends[2][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("router", [TopK(k=1), Scenario(), MeteoRA(k=1)], ids=["top_k", "scenario", "meteora"])
def test_routers_that_nothing_teaches_are_not_trained(tmp_path: Path, base: str, router: RouterSpec) -> None:
    for objectives in ([], [TaskCrossEntropy(weight=0.0)]):
        with pytest.raises(
            ValueError, match="the loss of the answers teaches it nothing; add an objective on routings"
        ):
            fit(tmp_path, module_of(base, router, objectives=objectives))
    module = module_of(base, router, objectives=[TaskCrossEntropy()])
    module.configure_model()
    began = [parameter.clone() for parameter in module.mixture.routers.parameters()]
    fit(tmp_path, module, steps=1)
    after = module.mixture.routers.parameters()
    assert not any(torch.equal(one, two) for one, two in zip(began, after, strict=True))


def test_teaching_by_task_makes_a_router_know_them(tmp_path: Path, base: str) -> None:
    module = module_of(base, Softmax(per="model"), objectives=[TaskCrossEntropy(weight=1.0)])
    assert not module.pass_task  # the objective is told the tasks, the mixture is not
    fit(tmp_path, module, steps=30)
    data = MixedTasks(base, toy.toy_tasks(tmp_path, rows=(6, 6)), batch_size=4)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad(), module.mixture.eval().trace() as trace:
        module.mixture(**batch.inputs, prompt_mask=batch.prompt_mask)
    (weights,) = trace.routings["model"]
    own = [module.mixture.experts.index(name) for name in batch.task_names]
    assert weights[:, 0, 0].argmax(-1).tolist() == own
