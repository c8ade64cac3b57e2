from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from moadapt.adapters import CrossModal, LoRA
from moadapt.placement import Placement
from moadapt.router import RouterSpec
from moadapt.training import MixedTasks, MixtureModule, Optimization, PeftModule
from moadapt.training.loss import answer_logits
from moadapt.training.module import TaskModule
from moadapt.training.order import Draw, Place
from moadapt_routers import ByTask, Switch, TopK
from tests.training import runs, toy
from tests.training.runs import trainer

FAST = Optimization(learning_rate=2e-2)
EXPERTS = {"small": LoRA(rank=2), "large": LoRA(rank=3)}


def mixture(base: str, router: RouterSpec | None = None, **options: Any) -> MixtureModule:
    given = {"optimization": FAST, "shared": LoRA(rank=2), **options}
    return MixtureModule(base, EXPERTS, router=router or Switch(), **given)


def plain(base: str) -> PeftModule:
    return PeftModule(base, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), optimization=FAST)


@pytest.mark.parametrize("make", [mixture, plain])
def test_training_lowers_the_loss_and_leaves_the_base_alone(tmp_path: Path, base: str, make: Any) -> None:
    module, data = make(base), MixedTasks(base, toy.toy_tasks(tmp_path), batch_size=5)
    module.configure_model()
    frozen = {n: p.detach().clone() for n, p in module.transformer.named_parameters() if not p.requires_grad}
    losses: list[float] = []
    module.on_before_zero_grad = lambda optimizer: losses.append(float(module.trainer.callback_metrics.get("loss", 0)))
    fit = trainer(tmp_path, max_steps=20, limit_val_batches=0)
    fit.fit(module, datamodule=data)
    assert float(fit.callback_metrics["loss"]) < 0.8 * losses[1]
    assert {"loss/small", "loss/large"} <= set(fit.callback_metrics)
    now = dict(module.transformer.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())


@pytest.mark.parametrize("make", [mixture, plain])
def test_a_checkpoint_holds_no_base_loads_as_weights_only_and_gives_the_same_scores(
    tmp_path: Path, base: str, make: Any
) -> None:
    data = MixedTasks(base, toy.toy_tasks(tmp_path), batch_size=5)
    first = make(base)
    fit = trainer(tmp_path, max_steps=2, limit_val_batches=0)
    fit.fit(first, datamodule=data)
    fit.save_checkpoint(tmp_path / "some.ckpt")
    stored = torch.load(tmp_path / "some.ckpt", weights_only=True)
    assert stored["state_dict"].keys() == first.tensors().keys()
    assert stored["optimizer_states"][0]["state"]
    assert stored["lr_schedulers"]
    place = {"seed": 0, "epoch": 1, "step": 0, "steps_per_epoch": 2, "drawn": {"small": 6, "large": 4}}
    assert place.items() <= stored["MixedTasks"].items()
    second = make(base)
    trainer(tmp_path).validate(
        second, datamodule=data, ckpt_path=tmp_path / "some.ckpt", verbose=False, weights_only=True
    )
    assert all(torch.equal(second.tensors()[name], tensor) for name, tensor in first.tensors().items())


def test_a_checkpoint_of_a_run_with_frozen_adapters_resumes_with_them_frozen(tmp_path: Path, base: str) -> None:
    data = MixedTasks(base, toy.toy_tasks(tmp_path), batch_size=5)
    first, second = mixture(base), mixture(base)
    first.configure_model()
    first.mixture.freeze("small")
    fit = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    fit.fit(first, datamodule=data)
    fit.save_checkpoint(tmp_path / "some.ckpt")
    kept = {name: tensor.clone() for name, tensor in first.tensors().items() if "/small/" in name}
    more = trainer(tmp_path, max_steps=3, limit_val_batches=0)
    more.fit(second, datamodule=data, ckpt_path=tmp_path / "some.ckpt", weights_only=True)
    assert second.mixture.frozen == ("small",)
    assert all(torch.equal(second.tensors()[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("make", [mixture, plain])
def test_loading_is_strict_about_names_and_shapes(base: str, make: Any) -> None:
    module = make(base)
    module.configure_model()
    whole: dict[str, Tensor] = dict(module.state_dict())
    first = next(iter(whole))
    for wrong in (
        {name: tensor for name, tensor in whole.items() if name != first},
        {**whole, "more": whole[first]},
        {**whole, first: whole[first][:, :1]},
    ):
        with pytest.raises(ValueError, match="1 tensors are missing, unknown or of another shape"):
            module.load_state_dict(wrong)
    module.load_state_dict(whole)


def test_scores_are_logged_task_by_task_with_their_mean(tmp_path: Path, base: str) -> None:
    data = MixedTasks(base, toy.toy_tasks(tmp_path), batch_size=4)
    module = mixture(base)
    check = trainer(tmp_path)
    (logged,) = check.test(module, datamodule=data, verbose=False)
    assert set(logged) == {"small/exact", "large/exact", "score"}
    assert logged["score"] == pytest.approx((logged["small/exact"] + logged["large/exact"]) / 2)
    right = {"small": [0, 0], "large": [0, 0]}
    for batch in check.predict(module, datamodule=data) or []:
        for row in batch:
            right[row["task"]][0] += row["prediction"] == row["reference"]
            right[row["task"]][1] += 1
    assert right["small"][1] == 6
    assert right["large"][1] == 4
    assert {f"{task}/exact": pytest.approx(a / b) for task, (a, b) in right.items()}.items() <= logged.items()


def test_predictions_are_what_generating_row_by_row_gives(tmp_path: Path, base: str) -> None:
    module = mixture(base)
    rows = [
        {(row["task"], row["row"]): row["text"] for batch in found or [] for row in batch}
        for size in (1, 10)
        for found in [
            trainer(tmp_path).predict(
                module, datamodule=MixedTasks(base, toy.toy_tasks(tmp_path), batch_size=2, eval_batch_size=size)
            )
        ]
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 10


@pytest.mark.parametrize(
    ("router", "pass_task", "told"), [(TopK(k=1), False, False), (TopK(k=1), True, True), (ByTask(), False, True)]
)
def test_a_mixture_is_told_the_task_where_asked_or_needed(
    tmp_path: Path, base: str, router: RouterSpec, pass_task: bool, told: bool
) -> None:
    module = mixture(base, router, pass_task=pass_task)
    data = MixedTasks(base, toy.toy_tasks(tmp_path))
    data.setup("test")
    assert ("task" in module.options(next(iter(data.test_dataloader())))) == told


def test_routers_see_in_training_what_they_see_in_generation(tmp_path: Path, base: str) -> None:
    module = mixture(base, TopK(k=2))
    module.configure_model()
    data = MixedTasks(base, toy.toy_tasks(tmp_path, rows=(2, 2)), batch_size=4, eval_batch_size=1)
    data.setup("fit")
    routed: dict[int, Tensor] = {}
    trained = next(iter(data.train_dataloader()))
    with module.mixture.trace() as trace:
        answer_logits(module.model, trained, True, **module.options(trained))
    for row, weights in zip(trained.rows.tolist(), list(trace.routings.values())[-1][0], strict=True):
        routed[row] = weights
    for file in (tmp_path / "small", tmp_path / "large"):  # the same pictures in both splits
        for picture in file.glob("train-*.png"):
            picture.replace(file / picture.name.replace("train", "validation"))
    module.eval()
    for batch in data.val_dataloader():
        with module.mixture.trace() as trace:
            module.mixture(**batch.inputs, **module.options(batch))
        torch.testing.assert_close(list(trace.routings.values())[-1][0][0], routed[int(batch.rows)], rtol=0, atol=1e-5)


def test_what_banks_tell_is_logged_as_the_mean_over_sites_and_changes_nothing(tmp_path: Path, base: str) -> None:
    experts = {"small": CrossModal(rank=2), "large": LoRA(rank=2)}
    after: list[dict[str, Tensor]] = []
    for every, steps, logged in ((2, 4, True), (3, 4, True), (5, 4, False)):
        torch.manual_seed(0)
        module = MixtureModule(base, experts, CrossModal(rank=1), ByTask(), optimization=FAST)
        fit = trainer(tmp_path, max_steps=steps, limit_val_batches=0, log_every_n_steps=every)
        seen: list[dict[str, float]] = []
        module.on_before_zero_grad = lambda optimizer, m=module, s=seen: s.append(m.readings())
        fit.fit(module, datamodule=MixedTasks(base, toy.toy_tasks(tmp_path), batch_size=5))
        told = {name: value for name, value in fit.callback_metrics.items() if name.startswith("gate/")}
        after.append({name: tensor.clone() for name, tensor in module.tensors().items()})
        if not logged:
            assert not told
            continue
        banks = [bank.readings() for _, bank in module.mixture.banks()]
        names = {f"gate/{name}/{way}" for name in ("small", "shared") for way in ("image_to_text", "text_to_image")}
        assert told.keys() == names
        if every == 2:  # the last step was logged
            for name in names:
                values = [found[name] for found in banks if name in found]
                assert len(values) > 1
                assert float(told[name]) == pytest.approx(sum(values) / len(values), rel=1e-6)
                assert float(told[name]) > 0
    assert all(torch.equal(tensor, other[name]) for other in after[1:] for name, tensor in after[0].items())


def test_roles_follow_tower_and_kind(base: str) -> None:
    everywhere = Placement(towers=("vision", "connector", "language"), kinds=("attention", "mlp", "projector"))
    module = mixture(base, placement=everywhere)
    module.configure_model()
    roles = module.roles()
    assert {(role.tower, role.kind) for role in roles.values()} == {
        *((tower, kind) for tower in ("vision", "connector", "language") for kind in ("shared", "expert")),
        ("router", "router"),
    }
    assert {id(p) for p in roles} == {id(p) for p in module.parameters() if p.requires_grad}
    for site, bank in module.mixture.banks():
        assert all(roles[p].tower == site.tower for p in bank.parameters())


def gradients(module: TaskModule, data: MixedTasks, folder: Path, **options: Any) -> dict[str, Tensor]:
    """The gradients of the first optimiser step."""
    found: dict[str, Tensor] = {}

    def keep(optimizer: torch.optim.Optimizer) -> None:
        type(module).on_before_optimizer_step(module, optimizer)
        found.update({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})

    module.on_before_optimizer_step = keep  # type: ignore[method-assign]
    trainer(folder, max_steps=1, limit_val_batches=0, precision="64-true", **options).fit(module, datamodule=data)
    return found


def test_accumulated_batches_give_the_gradient_of_one_batch(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    modules = [mixture(base, ByTask()) for _ in range(2)]
    for module in modules:
        module.configure_model()
        for parameter in module.roles():
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(parameter)))
    tasks = toy.toy_tasks(tmp_path, rows=(6, 3))
    whole = gradients(modules[0], MixedTasks(base, tasks, batch_size=9), tmp_path)
    monkeypatch.setattr("moadapt.training.order.MixedOrder.batch", _by_colour)
    parts = gradients(modules[1], MixedTasks(base, tasks, batch_size=3), tmp_path, accumulate_grad_batches=3)
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-7)  # norms are float32


def _by_colour(order: Any, place: Place) -> tuple[list[Draw], Place]:
    """Three rows of one colour a batch, so that batches differ in their number of tokens."""
    rows = [0, 3, 6, 1, 4, 7, 2, 5, 8]
    after = replace(place, step=place.step + 1)
    return [Draw(row, 0) for row in rows[place.step * order.batch_size :][: order.batch_size]], after


def test_dropout_is_a_function_of_the_step_and_not_of_what_was_drawn_before(tmp_path: Path, base: str) -> None:
    results = []
    for noise in (1, 2):
        torch.manual_seed(0)
        module = runs.module(base, dropout=0.5)
        module.configure_model()
        torch.manual_seed(noise)
        data = MixedTasks(base, toy.toy_tasks(tmp_path), batch_size=5)
        trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(module, datamodule=data)
        results.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_a_cosine_without_an_end_is_refused(tmp_path: Path, base: str) -> None:
    data = MixedTasks(base, toy.toy_tasks(tmp_path))
    with pytest.raises(ValueError, match="a cosine needs an end"):
        trainer(tmp_path, max_epochs=-1).fit(mixture(base), datamodule=data)


def test_a_trainer_without_the_tasks_is_told_what_it_needs(tmp_path: Path, base: str) -> None:
    data = MixedTasks(base, toy.toy_tasks(tmp_path))
    data.setup("test")
    with pytest.raises(ValueError, match=r"give the trainer datamodule=MixedTasks"):
        trainer(tmp_path).test(mixture(base), dataloaders=data.test_dataloader())
