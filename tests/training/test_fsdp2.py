"""A base that is sharded over two processes trains its adapters as a whole one does."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from peft import LoraConfig
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing import ProcessRaisedException

import moadapt
from moadapt.adapters import FamilySpec, LoRA
from moadapt.bases import load_base
from moadapt.cli.callbacks import SaveMixture
from moadapt.router import RouterSpec
from moadapt.storage import tensors
from moadapt.training import FSDP2Strategy, KeepLast, Optimization, PeftModule, sharding
from moadapt.training.routing_log import LogRouting
from moadapt_routers import ByTask, Poly, TopK
from tests.conformance.canonical import VISION
from tests.training.processes import assert_same, fit, randomized
from tests.training.runs import trainer
from tests.training.test_ddp import EXACT, FAMILY_CASES, FAST, TOWERS, made, mixture

EVEN = Optimization(learning_rate=1e-2, schedule="constant", warmup=0)
SHARDED = {**EXACT, "strategy": FSDP2Strategy}


@pytest.mark.parametrize(
    ("router", "checkpointing"),
    [
        (ByTask(), False),
        (TopK(k=2, scope="token"), True),
        pytest.param(ByTask(), True, marks=pytest.mark.slow),
        pytest.param(TopK(k=1), False, marks=pytest.mark.slow),
        pytest.param(Poly(heads=2), False, marks=pytest.mark.slow),
    ],
    ids=["task", "top2-checkpointed", "task-checkpointed", "top1", "skills"],
)
def test_a_sharded_base_trains_as_a_whole_one(
    tmp_path: Path, base: str, router: RouterSpec, checkpointing: bool
) -> None:
    make = partial(
        made, partial(mixture, base, router, gradient_checkpointing=checkpointing, placement=TOWERS), tmp_path
    )
    [one] = fit(tmp_path / "one", make, 1, **EXACT)
    two = fit(tmp_path / "two", make, 2, **SHARDED)
    assert_same(two, one, 1e-9 if isinstance(router, ByTask) else 1e-6)


@pytest.mark.parametrize("family", FAMILY_CASES)
def test_every_family_trains_on_a_sharded_base(tmp_path: Path, base: str, family: type[FamilySpec]) -> None:
    where = TOWERS if family.causal else VISION
    make = partial(made, partial(mixture, base, ByTask(), family(), placement=where), tmp_path)
    [one] = fit(tmp_path / "one", make, 1, **EXACT)
    two = fit(tmp_path / "two", make, 2, **SHARDED)
    assert_same(two, one, 1e-6)


class Parts(Callback):
    """Requires that each of two processes holds half of every block's weights, and adapters whole."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        mixture = pl_module.mixture
        blocks = mixture.anatomy.tower("language").blocks
        inside = [(n, p) for block in blocks for n, p in mixture.base.get_submodule(block).named_parameters()]
        parts = [parameter for name, parameter in inside if "banks" not in name]
        assert parts
        assert all(isinstance(p, DTensor) and 2 * p.to_local().numel() == p.numel() for p in parts)
        assert not any(isinstance(p, DTensor) for _, p in mixture.named_adapter_parameters())


def test_a_sharded_run_is_scored_saved_and_taken_up_again(tmp_path: Path, base: str) -> None:
    """A process has no row in the last batch of a task, and answers end at different lengths."""
    make = partial(made, partial(mixture, base, TopK(k=2), optimization=EVEN), tmp_path, rows=(7, 5), eval_batch_size=2)
    options = {"limit_val_batches": 1.0, "gradient_clip_val": 1.0, "max_steps": 4}
    results, folders = [], [tmp_path / "one", tmp_path / "two"]
    for folder, processes, strategy in zip(folders, (1, 2), (DDPStrategy, FSDP2Strategy), strict=True):
        after = (LogRouting(folder), KeepLast(folder, every_n_steps=2), SaveMixture(folder / "mixture"), Parts())
        callbacks = after if processes == 2 else after[:-1]
        results.append(fit(folder, make, processes, *callbacks, strategy=strategy, **options))
    one, two = results
    assert_same(two, one[0], 1e-5)
    assert {"score", "routing/entropy"} <= one[0]["logged"].keys()
    for own in two:
        assert own["logged"] == {name: pytest.approx(value, abs=1e-5) for name, value in one[0]["logged"].items()}
    files = [folder / "mixture" / "mixture.json" for folder in folders]
    assert files[0].read_text() == files[1].read_text()
    saved = moadapt.load(files[1].parent, load_base(base)[0])
    for name, tensor in tensors(saved).items():
        assert torch.equal(tensor, two[0]["weights"][name])
    rest = {**two[0], "losses": two[0]["losses"][2:], "gradients": two[0]["gradients"][2:]}
    for before in (FSDP2Strategy, DDPStrategy):
        parts = tmp_path / before.__name__
        for steps, start, strategy in ((2, None, before), (4, parts / "last.ckpt", FSDP2Strategy)):
            own = {**options, "limit_val_batches": 0, "max_steps": steps, "strategy": strategy}
            resumed = fit(parts, make, 2, KeepLast(parts, every_n_steps=2), ckpt_path=start, **own)
        assert_same(resumed, rest, 0)


def test_a_sharded_peft_model_trains_as_a_whole_one(tmp_path: Path, base: str) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    make = partial(made, lambda: randomized(PeftModule(base, config, FAST)), tmp_path)
    [one] = fit(tmp_path / "one", make, 1, **EXACT)
    assert_same(fit(tmp_path / "two", make, 2, **SHARDED), one, 1e-9)


def test_other_ways_to_shard_are_refused(tmp_path: Path, base: str) -> None:
    module, _ = made(partial(mixture, base, ByTask()), tmp_path)
    fit = trainer(tmp_path)
    fit.strategy.__class__ = ModelParallelStrategy
    module.trainer = fit
    with pytest.raises(ValueError, match="ModelParallelStrategy, which would spread adapters"):
        module.setup("fit")


def test_adapters_that_wait_for_data_are_refused(tmp_path: Path, base: str) -> None:
    make = partial(mixture, base, ByTask(), LoRA(rank=2, init="corda_preserve"))
    with pytest.raises(ProcessRaisedException, match="start from data; start and save them on one process"):
        fit(tmp_path / "two", partial(made, make, tmp_path), 2, strategy=FSDP2Strategy)


def test_a_quantised_base_is_refused(tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "is_quantised", lambda module: isinstance(module, nn.Linear))
    with pytest.raises(ProcessRaisedException, match="leave quantize out, or give strategy: ddp"):
        fit(tmp_path / "two", partial(made, partial(mixture, base, ByTask()), tmp_path), 2, strategy=FSDP2Strategy)
