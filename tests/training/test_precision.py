"""Autocast, accumulation, checkpointing and compilation through the trainer, one by one and together."""

import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

from moadapt.adapters import LoRA
from moadapt.training import MixedTasks, MixtureModule, Optimization
from moadapt_routers import Softmax
from tests.training import toy
from tests.training.runs import trainer


def gradients(
    folder: Path, base: str, precision: str = "32-true", batch_size: int = 4, parts: int = 1, **options: Any
) -> Tensor:
    """Return the gradients that one step leaves, as one vector."""
    lightning.seed_everything(0, verbose=False)
    settings = Optimization(learning_rate=1e-3, warmup=0)
    module = MixtureModule(
        base, {"small": LoRA(rank=2), "large": LoRA(rank=2)}, LoRA(rank=2), Softmax(), optimization=settings, **options
    )
    module.configure_model()
    for _, parameter in module.mixture.named_adapter_parameters():
        nn.init.normal_(parameter, std=0.2)
    data = MixedTasks(base, toy.toy_tasks(folder, rows=(4, 4)), batch_size=batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo warns of what it leaves to Python
        made = trainer(folder, max_steps=1, limit_val_batches=0, precision=precision, accumulate_grad_batches=parts)
        made.fit(module, datamodule=data)
    left = {n: p.grad for n, p in module.mixture.named_adapter_parameters() if p.grad is not None}
    return torch.cat([tensor.float().flatten() for tensor in left.values()])


def assert_alike(found: Tensor, expected: Tensor, room: float) -> None:
    assert found.isfinite().all()
    assert float((found - expected).norm() / expected.norm()) < room


# what bfloat16's eight bits leave of a gradient after a few layers
ROOM = {"32-true": 1e-4, "bf16-mixed": 0.05, "16-mixed": 0.05}


@pytest.mark.filterwarnings("ignore:You passed `Trainer.accelerator='cpu', precision='16-mixed'`")
@pytest.mark.parametrize("precision", ROOM)
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"batch_size": 2, "parts": 2}],
    ids=["plain", "checkpointed", "accumulated"],
)
def test_a_step_has_the_gradients_of_the_plain_one(
    tmp_path: Path, base: str, precision: str, options: dict[str, Any]
) -> None:
    expected = gradients(tmp_path, base)
    assert_alike(gradients(tmp_path, base, precision, **options), expected, ROOM[precision])


def test_a_base_of_bfloat16_trains_adapters_under_autocast(tmp_path: Path, base: str) -> None:
    found = gradients(tmp_path, base, "bf16-mixed", dtype="bfloat16", gradient_checkpointing=True)
    assert_alike(found, gradients(tmp_path, base), 0.1)


@pytest.mark.parametrize(
    ("precision", "checkpointing"),
    [("32-true", False), pytest.param("bf16-mixed", False, marks=pytest.mark.slow),
     pytest.param("32-true", True, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_compiled_mixture_trains_the_same(tmp_path: Path, base: str, precision: str, checkpointing: bool) -> None:
    torch._dynamo.reset()
    found = gradients(tmp_path, base, precision, compile="aot_eager", gradient_checkpointing=checkpointing)
    torch._dynamo.reset()
    assert_alike(found, gradients(tmp_path, base, precision), ROOM[precision])


def test_an_unknown_backend_is_refused(base: str) -> None:
    with pytest.raises(ValueError, match="give a backend"):
        MixtureModule(base, shared=LoRA(), compile="conductor")
