"""A step whose loss or gradient is not finite moves nothing, on no process; it is counted, and its batch kept."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import load_file
from torch import Tensor

from moadapt.adapters import LoRA
from moadapt.objectives import Orthogonality
from moadapt.ranks import Gates
from moadapt.training import KeepLast, MixedTasks, MixtureModule, Optimization, SkipBadSteps
from moadapt.training.run_failed import RunFailed
from moadapt_routers import Softmax
from tests.training import toy
from tests.training.runs import trainer

BAD = {
    "loss": lambda loss, module: loss * math.nan,
    "infinite loss": lambda loss, module: loss + math.inf,
    "gradient": lambda loss, module: loss + torch.sqrt(next(iter(module.roles())).sum() * 0.0),  # 0, of infinite slope
}


class Planted(MixtureModule):
    """Spoils the loss of some batches, on one process."""

    at: tuple[int, ...] = ()
    spoil: Callable[[Tensor, Any], Tensor] = staticmethod(BAD["loss"])
    process = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return self.spoil(loss, self) if batch.step in self.at and self.global_rank == self.process else loss


class States(Callback):
    """What each step left, copied."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.found = [self._now(trainer, pl_module)]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *of_step: Any) -> None:
        self.found.append(self._now(trainer, pl_module))

    def _now(self, trainer: Any, module: Any) -> dict[str, Any]:
        moments = [state for state in trainer.optimizers[0].state.values() if state]
        driver = {} if module._driver is None else {"logits": module._driver.state()["logits"]}
        flat = {f"{i}/{k}": v.clone() for i, state in enumerate(moments) for k, v in state.items()}
        return {name: tensor.clone() for name, tensor in {**module.tensors(), **flat, **driver}.items()}


def made(base: str, at: tuple[int, ...], spoil: str = "loss", **options: Any) -> Planted:
    experts = {"small": LoRA(rank=2), "large": LoRA(rank=2)}
    rates = Optimization(learning_rate=1e-2, schedule="constant", warmup=0)
    module = Planted(base, experts, LoRA(rank=1), Softmax(), optimization=rates, **options)
    module.at, module.spoil = at, BAD[spoil]
    return module


def fit(folder: Path, module: MixtureModule, limit: int = 20, **options: Any) -> tuple[States, SkipBadSteps]:
    states, bad = States(), SkipBadSteps(folder / "bad", limit)
    more = options.pop("callbacks", [])
    given = {"max_steps": 5, "limit_val_batches": 0, "gradient_clip_val": 1.0, **options}
    loaded = {key: given.pop(key) for key in ("ckpt_path", "weights_only") if key in given}
    data = MixedTasks(module.base, toy.toy_tasks(folder), batch_size=5)
    trainer(folder, states, bad, *more, **given).fit(module, datamodule=data, **loaded)
    return states, bad


def same(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("spoil", BAD)
def test_a_bad_step_moves_nothing_and_the_others_do(
    tmp_path: Path, base: str, spoil: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"objectives": [Orthogonality(weight=1.0)], "ranks": Gates(budget=0.5)}
    states, bad = fit(tmp_path, made(base, (2, 3), spoil, **options), max_steps=10)
    still = [same(before, after) for before, after in zip(states.found, states.found[1:], strict=False)]
    assert still == [step in (2, 3) for step in range(10)]
    assert all(tensor.isfinite().all() for tensor in states.found[-1].values())
    assert bad.skipped == 2
    assert "step 3 is skipped: its loss or gradient is not finite" in caplog.text
    assert "(2 of 20 that are allowed)" in caplog.text


def test_the_batch_of_a_bad_step_is_kept_to_be_looked_at(tmp_path: Path, base: str) -> None:
    seen: list[Any] = []

    class Seeing(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            seen.append(batch)

    module = made(base, (2,))
    module.log = lambda name, value, **rest: logged.append((name, value))  # type: ignore[method-assign]
    logged: list[tuple[str, Any]] = []
    fit(tmp_path, module, callbacks=[Seeing()])
    assert [value for name, value in logged if name == "skipped_steps"] == [1.0]
    assert sorted(file.name for file in (tmp_path / "bad").iterdir()) == [
        "step-000002-0.json",
        "step-000002-0.safetensors",
    ]
    told = json.loads((tmp_path / "bad" / "step-000002-0.json").read_text())
    assert [(row["task"], row["row"]) for row in told["rows"]] == list(
        zip(seen[2].task_names, seen[2].rows.tolist(), strict=True)
    )
    assert (told["step"], told["process"], told["loss"], told["gradient_norm"]) == (2, 0, "nan", "nan")
    assert all(Path(row["images"][0]).is_file() for row in told["rows"])
    stored = load_file(tmp_path / "bad" / "step-000002-0.safetensors")
    assert same(stored, {**seen[2].inputs, "labels": seen[2].labels})


def test_of_accumulated_batches_the_bad_ones_are_kept(tmp_path: Path, base: str) -> None:
    _, bad = fit(tmp_path, made(base, (2, 5)), accumulate_grad_batches=2, max_steps=4)
    assert bad.skipped == 2  # the batches 2 and 3, and 4 and 5
    files = sorted((tmp_path / "bad").glob("*.json"))
    assert [file.stem for file in files] == ["step-000001-0-0", "step-000001-0-1", "step-000002-0"]
    assert [json.loads(file.read_text())["loss"] == "nan" for file in files] == [True, False, True]


def test_a_run_with_too_many_bad_steps_ends_and_says_what_to_do(tmp_path: Path, base: str) -> None:
    with pytest.raises(RunFailed, match=r"2 steps .* not finite, and the limit is 1\. Look at their batches in .*bad"):
        fit(tmp_path, made(base, (1, 3)), limit=1)
    _, bad = fit(tmp_path, made(base, (1, 3)), limit=2)
    assert bad.skipped == 2
    with pytest.raises(ValueError, match="limit of bad steps is -1; give at least 0"):
        SkipBadSteps(tmp_path, -1)


@pytest.mark.parametrize("cut", [2, 3])
def test_a_resumed_run_goes_on_counting_and_ends_as_the_whole_one(tmp_path: Path, base: str, cut: int) -> None:
    ranks = {"ranks": Gates(budget=0.5)}
    torch.manual_seed(0)
    whole, _ = fit(tmp_path, made(base, (1, 2), **ranks), max_steps=10)
    torch.manual_seed(0)
    fit(tmp_path, made(base, (1, 2), **ranks), callbacks=[KeepLast(tmp_path, 1), Leaving(cut)], max_steps=10)
    torch.manual_seed(1)
    last = tmp_path / "last.ckpt"
    cut_states, bad = fit(tmp_path, made(base, (1, 2), **ranks), max_steps=10, ckpt_path=last, weights_only=True)
    assert bad.skipped == 2
    assert same(cut_states.found[-1], whole.found[-1])


class Leaving(Callback):
    """Ends training after some steps, as the end of a run that was to be that long."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Any, *of_step: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


@pytest.mark.parametrize(("start", "counted"), [(4.0, 2), (1.0, 4)])
def test_a_step_that_the_scaler_of_float16_skips_is_not_counted(
    tmp_path: Path, base: str, start: float, counted: int
) -> None:
    """Gradients overflow in four steps: a scale of 4 falls to 2 and to 1, and is then not to blame any more."""
    scaler = torch.amp.GradScaler("cpu", init_scale=start)
    half = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    states, bad = fit(tmp_path, made(base, (1, 2, 3, 4), "gradient"), plugins=[half], max_steps=6)
    assert bad.skipped == counted
    assert [same(a, b) for a, b in zip(states.found, states.found[1:], strict=False)] == [False, *[True] * 4, False]


@pytest.mark.parametrize("spoil", ["loss", "gradient"])
def test_what_is_bad_on_one_process_is_skipped_on_all(tmp_path: Path, base: str, spoil: str) -> None:
    module = made(base, (1,), spoil)
    module.process = 1

    class Keeping(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            torch.save(pl_module.state_dict(), tmp_path / f"{trainer.global_rank}.pt")

    data = MixedTasks(base, toy.toy_tasks(tmp_path), batch_size=4)
    two = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False, "max_steps": 3}
    bad = SkipBadSteps(tmp_path / "bad")
    trainer(tmp_path, bad, Keeping(), **two, limit_val_batches=0).fit(module, datamodule=data)
    first, second = (torch.load(tmp_path / f"{process}.pt", weights_only=True) for process in (0, 1))
    assert same(first, second)
    assert all(tensor.isfinite().all() for tensor in first.values())
    files = [json.loads((tmp_path / "bad" / f"step-000001-{process}.json").read_text()) for process in (0, 1)]
    assert [file["loss"] == "nan" for file in files] == [False, spoil == "loss"]
