"""Stages of unfreezing: who moves when, after a stop too, and on several processes."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from moadapt.adapters import LoRA
from moadapt.placement import Placement
from moadapt.training import MixedTasks, MixtureModule, Optimization
from moadapt.training.roles import Role
from moadapt.training.unfreezing import Stage, Unfreezing
from moadapt_routers import TopK
from tests.training import toy
from tests.training.runs import trainer

STEPS = 10
LATER = (Stage(kinds=("expert",), share=0.3), Stage(kinds=("router",), share=0.6))
DECAY = {"learning_rate": 1e-2, "warmup": 0, "weight_decay": 0.5}


def mixture(base: str, stages: tuple[Stage, ...] = LATER, **options: Any) -> MixtureModule:
    """All LoRAs are random, so that every gradient is there from the first step on."""
    lightning.seed_everything(0, verbose=False)
    everywhere = Placement(towers=("vision", "language"))
    module = MixtureModule(
        base, {"small": LoRA(rank=2), "large": LoRA(rank=2)}, LoRA(rank=2), TopK(k=2), everywhere,
        optimization=Optimization(unfreezing=stages, **{**DECAY, **options}),
    )  # fmt: skip
    module.configure_model()
    for parameter in module.roles():
        nn.init.normal_(parameter, std=0.2)
    return module


class Moves(Callback):
    """Notes which kinds and depths of parameters each step moved."""

    def __init__(self) -> None:
        self.moved: list[set[tuple[str, str, float | None]]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, *rest: Any) -> None:
        self.before = {parameter: parameter.detach().clone() for parameter in module.roles()}

    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        roles = module.roles()
        moved = {p for p, value in self.before.items() if not torch.equal(p, value)}
        self.moved.append({(roles[p].tower, roles[p].kind, roles[p].depth) for p in moved})


def fit(folder: Path, base: str, module: MixtureModule, *callbacks: Callback, **options: Any) -> Any:
    data = MixedTasks(base, toy.toy_tasks(folder), batch_size=4)
    made = trainer(folder, *callbacks, **{"limit_val_batches": 0, "max_steps": STEPS, **options})
    path = folder / "some.ckpt"
    made.fit(module, datamodule=data, ckpt_path=path if path.is_file() else None, weights_only=True)
    return made


def test_experts_and_routers_move_when_their_stage_begins(tmp_path: Path, base: str) -> None:
    watch = Moves()
    fit(tmp_path, base, mixture(base), watch)
    kinds = [{kind for _, kind, _ in moved} for moved in watch.moved]
    assert kinds == [{"shared"}] * 3 + [{"shared", "expert"}] * 3 + [{"shared", "expert", "router"}] * 4


def test_towers_unfreeze_from_top_to_bottom_by_epoch(tmp_path: Path, base: str) -> None:
    stages = (Stage(depth=(0.0, 0.5), epoch=1), Stage(towers=("vision",), epoch=2))
    watch = Moves()
    done = fit(tmp_path, base, mixture(base, stages), watch, max_epochs=3, max_steps=-1)
    places = [{(tower, depth) for tower, kind, depth in moved if kind == "expert"} for moved in watch.moved]
    epoch = done.global_step // 3
    first, second, third = places[0], places[epoch], places[2 * epoch]
    assert places == [first] * epoch + [second] * epoch + [third] * epoch
    assert first == {("language", 0.5)}
    assert second == first | {("language", 0.0)}
    assert third == second | {("vision", 0.0), ("vision", 0.5)}


def test_what_thaws_gets_a_fresh_state_then_and_moves_as_if_training_began(tmp_path: Path, base: str) -> None:
    module = mixture(base)
    roles = module.roles()
    counts: list[dict[str, set[int]]] = []

    class States(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
            (optimizer,) = trainer.optimizers
            found: dict[str, set[int]] = {}
            for parameter, role in roles.items():
                state = optimizer.state.get(parameter, {})
                found.setdefault(role.kind, set()).update(int(s) for s in state["step"].view(-1)) if state else None
            counts.append(found)

    fit(tmp_path, base, module, States())
    for step, found in enumerate(counts):
        assert set(found) == {"shared"} | ({"expert"} if step >= 3 else set()) | ({"router"} if step >= 6 else set())
        assert found["shared"] == {step + 1}
        assert found.get("expert", {step - 2}) == {step - 2}
        assert found.get("router", {step - 5}) == {step - 5}


@pytest.mark.parametrize("stop", [2, 3, 5, 7])
def test_a_run_stopped_anywhere_ends_as_the_undisturbed_one(tmp_path: Path, base: str, stop: int) -> None:
    whole = mixture(base)
    fit(tmp_path / "whole", base, whole)

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "parts" / "some.ckpt")
                trainer.should_stop = True

    fit(tmp_path / "parts", base, mixture(base), Stop())
    second = mixture(base)
    fit(tmp_path / "parts", base, second)
    assert all(torch.equal(second.tensors()[name], tensor) for name, tensor in whole.tensors().items())


class Ends(MixtureModule):
    """Keeps what it ends with."""

    file = Path()

    def on_train_end(self) -> None:
        if self.global_rank == 0:
            torch.save(self.state_dict(), self.file)


def test_two_processes_unfreeze_as_one_does(tmp_path: Path, base: str) -> None:
    found: list[dict[str, Tensor]] = []
    for processes in (1, 2):
        module = mixture(base)
        module.__class__ = Ends
        module.file = tmp_path / f"{processes}.pt"  # type: ignore[attr-defined]
        several = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False} if processes == 2 else {}
        fit(tmp_path, base, module, precision="64-true", gradient_clip_val=0.1, **several)
        found.append(torch.load(tmp_path / f"{processes}.pt", weights_only=True))
    # routers compute in float32, and AdamW's first step makes much of what small gradients are rounded by
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=1e-4)


def test_what_stands_still_does_not_count_where_gradients_are_clipped(tmp_path: Path, base: str) -> None:
    module = mixture(base, (Stage(kinds=("expert", "router"), share=0.9),))
    norms: list[float] = []

    class Norms(Callback):
        def on_before_zero_grad(self, *_: Any) -> None:
            left = [p.grad.norm() for p in module.roles() if p.grad is not None]
            norms.extend([float(torch.stack(left).norm())] if left else [])

    fit(tmp_path, base, module, Norms(), gradient_clip_val=1e-3, max_steps=3)
    assert norms
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-2)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({}, "exactly one"),
        ({"share": 0.5, "epoch": 1}, "exactly one"),
        ({"share": 0.0}, "between 0 and 1"),
        ({"share": 1.0}, "between 0 and 1"),
        ({"epoch": 0}, "1 or more"),
        ({"epoch": 1, "kinds": ("experts",)}, "shared, expert, cross_modal, router"),
        ({"epoch": 1, "kinds": ()}, "give a list"),
        ({"epoch": 1, "towers": "vision"}, "give a list"),
        ({"epoch": 1, "depth": (0.5, 0.5)}, "first < last"),
    ],
)
def test_stages_that_make_no_sense_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Stage(**wrong)


@pytest.mark.parametrize(
    ("stages", "steps", "epochs", "told"),
    [
        ((Stage(kinds=("router",), epoch=1),), 10, None, "names nothing that is trained; there are expert in vision"),
        ((Stage(kinds=("expert",), share=0.5),), float("inf"), None, "needs an end"),
        ((Stage(kinds=("expert",), epoch=3),), 10, 3, "never begins"),
        ((Stage(share=0.1), Stage(kinds=("shared",), epoch=1)), 10, None, "leave something"),
    ],
)
def test_stages_that_do_not_fit_the_run_are_refused(
    stages: tuple[Stage, ...], steps: float, epochs: int | None, told: str
) -> None:
    roles = {nn.Parameter(torch.ones(1)): Role("vision", kind) for kind in ("shared", "expert")}
    with pytest.raises(ValueError, match=told):
        Unfreezing(stages, roles, steps, epochs)


def test_a_stage_once_begun_never_ends() -> None:
    for stage in (Stage(share=0.37), Stage(epoch=3)):
        begun = [stage.begun(step, 100, step // 10) for step in range(100)]
        assert all(after >= before for before, after in pairwise(begun))
        assert begun.index(True) == (37 if stage.share else 30)
