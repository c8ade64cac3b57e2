"""Routers in training: routers alone on saved adapters, schedules, sampled choices."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

import moadapt
from moadapt import attach
from moadapt.adapters import Hydra, LoRA
from moadapt.bases import load_base
from moadapt.objectives import TaskCrossEntropy
from moadapt.ranks import ExplainedVariance, Gates, Importance, RankAllocator
from moadapt.router import RouterSpec
from moadapt.storage import tensors
from moadapt.training import MixedTasks, MixtureModule, Optimization
from moadapt.training.noise import keyed_noise, shared_noise
from moadapt_routers import ByTask, HardToSoft, Poly, ReMix, Softmax
from tests.models import randomize
from tests.training import toy
from tests.training.runs import trainer


def module_of(base: str, router: RouterSpec, **options: Any) -> MixtureModule:
    torch.manual_seed(0)
    experts = {name: LoRA(rank=2) for name in ("small", "large")}
    settings = Optimization(learning_rate=1e-2, router_learning_rate=1e-2, warmup=0, schedule="constant")
    return MixtureModule(base, experts, LoRA(rank=2), router, optimization=settings, **options)


def fit(folder: Path, module: MixtureModule, *callbacks: Callback, steps: int = 3, **options: Any) -> None:
    data = MixedTasks(module.base, toy.toy_tasks(folder, rows=(6, 6)), batch_size=4)
    given = {"max_steps": steps, "limit_val_batches": 0, **options}
    trainer(folder, *callbacks, **given).fit(module, datamodule=data)


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
    """Notes what routers are told and how one of them decides."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        context = pl_module.mixture.context
        self.seen.append(float(context.progress))
        with torch.no_grad(), pl_module.mixture.trace() as trace:
            pl_module.mixture(**batch.inputs, task=batch.task_names, prompt_mask=batch.prompt_mask)
        self.weights.append(next(iter(trace.routings.values()))[0])


def test_routers_are_told_how_far_training_is(tmp_path: Path, base: str) -> None:
    module, watch = module_of(base, HardToSoft(k=2, hard=0.5)), Progress()
    fit(tmp_path, module, watch, steps=4)
    assert watch.seen == [0.0, 0.25, 0.5, 0.75]
    hard = [bool(((weights == 0) | (weights == 1)).all()) for weights in watch.weights]
    assert hard == [True, True, False, False]
    assert module.mixture.context.progress is None


def test_accumulated_batches_share_the_noise_of_their_step(tmp_path: Path, base: str) -> None:
    seeds = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            seeds.append(pl_module.mixture.context.noise.initial_seed())

    module = module_of(base, Poly())
    fit(tmp_path, module, Watch(), steps=2, accumulate_grad_batches=2)
    first, again, second = seeds  # an epoch of three batches ends with a step
    assert first == again != second
    assert module.mixture.context.noise is None


def test_the_noise_that_processes_share_is_none_of_their_own() -> None:
    with keyed_noise(torch.device("cpu"), 3, 7, 0):  # the first process's
        own = torch.rand(4)
    assert not torch.equal(torch.rand(4, generator=shared_noise(3, 7)), own)


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
