"""Starts and ranks that follow data: found once, before the first step of a fresh fit, the same on all processes."""

import random
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import Tensor

import moadapt
from moadapt.adapters import LoRA
from moadapt.bases import load_base
from moadapt.ranks import ExplainedVariance
from moadapt.ranks.allocator import ranks_of
from moadapt.training import KeepLast, MixedTasks, MixtureModule, Optimization, Stopped
from moadapt_routers import ByTask
from tests.training import toy
from tests.training.runs import Watch, trainer

RANKED = {"ranks": ExplainedVariance()}
OPTIONS: dict[str, dict[str, Any]] = {"starts": {}, "ranks": RANKED, "ranks alone": {**RANKED, "init": "default"}}


class Kept(MixtureModule):
    """Keeps what the first step starts from, and writes what each process ends with."""

    folder = Path()

    def on_train_start(self) -> None:
        super().on_train_start()
        self.first = {name: tensor.clone() for name, tensor in self.state_dict().items()}

    def on_train_end(self) -> None:
        torch.save(self.state_dict(), self.folder / f"{self.trainer.world_size}-{self.global_rank}.pt")


def module(base: str, folder: Path, init: str = "eva", **options: Any) -> Kept:
    experts = {name: LoRA(rank=3, init=init, dropout=0.1) for name in ("small", "large")}
    shared = LoRA(rank=3, init=init, dropout=0.1)
    settings = Optimization(learning_rate=1e-2)
    made = Kept(base, experts, shared, ByTask(), optimization=settings, calibration_batches=2, **options)
    made.folder = folder
    return made


def tasks(base: str, folder: Path) -> MixedTasks:
    return MixedTasks(base, toy.toy_tasks(folder, rows=(6, 6)), batch_size=4)


def fit(made: Kept, base: str, at: tuple[str, int] | None = None, **options: Any) -> Watch:
    """Train, from `last.ckpt` where there is one."""
    lightning.seed_everything(0, verbose=False)
    watch, last = Watch(at), made.folder / "last.ckpt"
    run = trainer(made.folder, watch, KeepLast(made.folder), limit_val_batches=0, **{"max_steps": 4, **options})
    data = tasks(base, made.folder.parent)
    run.fit(made, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)
    return watch


def test_a_fit_starts_as_initialising_with_its_first_batches_does(tmp_path: Path, base: str) -> None:
    made, data = module(base, tmp_path / "run"), tasks(base, tmp_path)
    made.folder.mkdir()
    watch = fit(made, base)
    data.setup("fit")
    batches = [batch.inputs for batch, _ in zip(data.train_dataloader(), range(2), strict=False)]
    mixture = moadapt.attach(load_base(base)[0], shared=made.shared, experts=made.experts, router=made.router)
    moadapt.initialise(mixture, batches)
    for site, bank in mixture.banks():
        for name in bank.names:
            for part, tensor in bank.state(name).items():
                torch.testing.assert_close(made.first[f"adapters/{name}/{site.path}/{part}"], tensor)
    plain = module(base, tmp_path / "plain", "default")
    plain.folder.mkdir()
    assert fit(plain, base).trained == watch.trained  # the same rows in the same order


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_ends_as_the_whole_one(
    tmp_path: Path, base: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for folder, stop in ((tmp_path / "whole", None), (tmp_path / "stopped", ("train", 1))):
        folder.mkdir()
        if stop:
            with pytest.raises(Stopped):
                fit(module(base, folder, **OPTIONS[name]), base, stop)
            if name == "starts":
                monkeypatch.setattr(MixedTasks, "first_batches", None)  # nothing is left to start
        made = module(base, folder, **OPTIONS[name])
        fit(made, base)
        results.append({n: tensor.clone() for n, tensor in made.state_dict().items()})
    whole, resumed = results
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)


def test_looking_at_data_disturbs_no_random_state(tmp_path: Path, base: str) -> None:
    made, data = module(base, tmp_path), tasks(base, tmp_path)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    data.setup("fit")
    loader, rows = data.train_dataloader(), []
    for batch in data.first_batches(7):  # beyond the epoch, of 3 steps
        rows += batch.rows.tolist()
    assert loader.steps_done == 0
    assert rows == [row for _ in range(3) for batch in loader for row in batch.rows.tolist()][: len(rows)]
    assert torch.equal(before[0], torch.get_rng_state()) is False  # torch's own loader drew from it
    torch.set_rng_state(before[0])
    list(data.first_batches(2))
    assert torch.equal(before[0], torch.get_rng_state())
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2][1])
    assert made.calibration_batches == 2


def test_what_was_loaded_or_trained_is_not_started_again(tmp_path: Path, base: str) -> None:
    made = module(base, tmp_path, **RANKED)
    fit(made, base)
    trained = {n: tensor.clone() for n, tensor in made.state_dict().items()}
    loaded = module(base, tmp_path, **RANKED)
    loaded.load_state_dict(trained)  # takes the ranks too
    (tmp_path / "last.ckpt").unlink()
    for again in (made, loaded):
        fit(again, base, max_steps=1)
        assert all(torch.equal(again.first[n], trained[n]) for n in trained)
        (tmp_path / "last.ckpt").unlink()


def test_ranks_follow_the_inputs_and_are_saved(tmp_path: Path, base: str) -> None:
    made = module(base, tmp_path, **RANKED)
    fit(made, base, max_steps=1)
    mixture = made.mixture
    ranks = ranks_of(mixture.spec, mixture.anatomy)
    assert ranks["shared"] == ranks["small"] == ranks["large"]
    assert sum(ranks["shared"].values()) == 3 * len(mixture.sites)
    assert len(set(ranks["shared"].values())) > 1
    for site, bank in mixture.banks():
        down = made.first[f"adapters/small/{site.path}/down"]
        assert len(down) == ranks["small"][site]
        torch.testing.assert_close(down @ down.T, torch.eye(len(down)), rtol=0, atol=1e-5)
        assert not bank.waiting
    mixture.save(tmp_path / "mixture")
    again = moadapt.load(tmp_path / "mixture", load_base(base)[0])
    assert ranks_of(again.spec, again.anatomy) == ranks


@pytest.mark.parametrize("name", OPTIONS)
def test_two_processes_start_and_train_as_one(tmp_path: Path, base: str, name: str) -> None:
    ended: dict[int, list[dict[str, Tensor]]] = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        torch.manual_seed(0)
        made = module(base, folder, dtype="float64", **OPTIONS[name])
        for adapter in (made.shared, *(made.experts or {}).values()):
            object.__setattr__(adapter, "dropout", 0.0)
        strategy = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False} if processes == 2 else {}
        fit(made, base, max_steps=3, precision="64-true", **strategy)
        files = [folder / f"{processes}-{rank}.pt" for rank in range(processes)]
        ended[processes] = [torch.load(file, weights_only=True) for file in files]
    (one,), two = ended[1], ended[2]
    assert one.keys() == two[0].keys() == two[1].keys()
    for key, tensor in one.items():
        assert torch.equal(two[0][key], two[1][key])
        torch.testing.assert_close(two[0][key], tensor, rtol=0, atol=1e-9)


def test_a_fit_without_calibration_batches_is_refused(base: str) -> None:
    with pytest.raises(ValueError, match="calibration_batches is 0; give at least 1"):
        MixtureModule(base, shared=LoRA(), calibration_batches=0)
