"""A run that goes on with another number of processes, in mid-epoch, ends as the undisturbed one, up to rounding."""

from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from moadapt.adapters import LoRA
from moadapt.sampling import Dynamic, Uniform
from moadapt.training import KeepLast, MixedTasks, MixtureModule, Optimization
from moadapt.training.module import TaskModule
from moadapt_routers import ByTask
from tests.training import toy
from tests.training.processes import fit, randomized

VALIDATED = {"val_check_interval": 2, "check_val_every_n_epoch": None, "limit_val_batches": 1.0}


def made(base: str, folder: Path, data: dict[str, Any]) -> tuple[TaskModule, MixedTasks]:
    """A mixture and two tasks of 11 and 6 rows, in batches that neither two nor three processes share evenly."""
    experts = {name: LoRA(rank=2) for name in ("small", "large")}
    settings = Optimization(learning_rate=1e-2, schedule="constant", warmup=0)
    module = randomized(MixtureModule(base, experts, LoRA(rank=2), ByTask(), optimization=settings))
    return module, MixedTasks(base, toy.toy_tasks(folder, rows=(11, 6)), **{"batch_size": 5, **data})


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")  # the numbers are the same on all processes
@pytest.mark.parametrize(
    ("first", "second", "data", "options"),
    [
        (1, 2, {}, {}),
        pytest.param(3, 1, {"sampling": Uniform(), "one_task": True}, {}, marks=pytest.mark.slow),
        pytest.param(2, 3, {"batch_tokens": 220, "batch_multiple": 6, "batch_size": 12}, {}, marks=pytest.mark.slow),
        (2, 1, {"sampling": Dynamic(floor=0.0, power=4.0)}, VALIDATED),
    ],
    ids=["mixed", "alone", "tokens", "following"],
)
def test_a_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, base: str, first: int, second: int, data: dict[str, Any], options: dict[str, Any]
) -> None:
    make = partial(made, base, tmp_path, data)
    exact = {"precision": "64-true", "gradient_clip_val": 1.0, **options}
    [whole] = fit(tmp_path / "whole", make, 1, max_steps=6, **exact)
    keep = KeepLast(tmp_path / "cut")
    before = fit(tmp_path / "cut", make, first, keep, max_steps=4, **exact)
    after = fit(tmp_path / "on", make, second, max_steps=6, ckpt_path=tmp_path / "cut" / "last.ckpt", **exact)
    taken = [
        list(chain(*parts)) for run in (before, after) for parts in zip(*(own["tasks"] for own in run), strict=True)
    ]
    assert taken == whole["tasks"]
    for own in after:
        for name, tensor in whole["weights"].items():
            # what a checkpoint gives back has passed through float32
            assert (own["weights"][name] - tensor).abs().max() < 1e-6
