"""A sampler that follows validations is told the same on all processes, and shares change with it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from moadapt.adapters import LoRA
from moadapt.objectives import LoadBalance
from moadapt.router import RouterSpec
from moadapt.sampling import Dynamic, Sampler
from moadapt.training import MixedTasks, MixtureModule, Optimization
from moadapt.training.following import validation_losses
from moadapt_routers import ByTask, TopK
from tests.training import toy
from tests.training.runs import trainer


class Keeping(MixtureModule):
    """Writes where its process stands in the data."""

    folder = Path()

    def on_train_end(self) -> None:
        torch.save(self.data.state_dict(), self.folder / f"{self.trainer.world_size}-{self.global_rank}.pt")


def fit(
    folder: Path, base: str, sampling: Sampler, processes: int = 1, router: RouterSpec | None = None, **options: Any
) -> tuple[MixtureModule, MixedTasks, list[dict[str, Any]]]:
    """Train four steps, validating after two and four."""
    torch.manual_seed(0)
    experts = {name: LoRA(rank=2) for name in ("small", "large")}
    module = Keeping(base, experts, router=router or ByTask(), optimization=Optimization(learning_rate=1e-2), **options)
    module.folder = folder
    data = MixedTasks(base, toy.toy_tasks(folder, rows=(7, 6)), batch_size=4, sampling=sampling)
    strategy = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False} if processes == 2 else {}
    validating = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    trained = trainer(folder, max_steps=4, precision="64-true", **validating, **strategy)
    trained.fit(module, datamodule=data)
    files = [folder / f"{processes}-{rank}.pt" for rank in range(processes)]
    return module, data, [torch.load(file, weights_only=True) for file in files]


def test_the_losses_of_a_validation_are_means_over_the_answer_tokens_of_each_task(tmp_path: Path, base: str) -> None:
    module, data, [state] = fit(tmp_path, base, Dynamic(), router=TopK(k=1), objectives=[LoadBalance()])
    module.eval()
    expected = {}
    for name in data.tasks:
        losses = []
        for batch in data.answered("validation"):
            labels = batch.labels.masked_fill(~torch.tensor([task == name for task in batch.task_names])[:, None], -100)
            logits = module.mixture(**batch.cast(torch.float64).inputs, prompt_mask=batch.prompt_mask).logits
            each = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
            losses.append(each[labels[:, 1:].flatten() != -100])
        expected[name] = torch.cat(losses).mean().item()
    assert validation_losses(module) == pytest.approx(expected)
    assert state["known"]["last"] == pytest.approx(expected)
    assert state["known"]["first"] != state["known"]["last"]
    assert not module._observed, "objectives judge what was trained on"


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")  # the numbers are the same on all processes
@pytest.mark.parametrize("by", ["loss", "score"])
def test_two_processes_follow_what_one_follows(tmp_path: Path, base: str, by: Any) -> None:
    sampling = Dynamic(by=by, floor=0.1, goals={"small": 0.5, "large": 0.9})
    _, _, [one] = fit(tmp_path, base, sampling)
    _, _, [two, other] = fit(tmp_path, base, sampling, processes=2)
    assert two == other
    assert two["drawn"] == one["drawn"]
    for key in ("first", "last"):
        assert two["known"][key] == pytest.approx(one["known"][key], abs=1e-9)


def test_the_task_that_is_behind_gets_more_rows_after_a_validation(tmp_path: Path, base: str) -> None:
    _, _, [state] = fit(tmp_path, base, Dynamic(floor=0.0, power=20.0, goals={"small": 100.0, "large": 0.01}))
    assert sum(state["drawn"].values()) == 16
    assert state["drawn"]["large"] in (11, 12, 13)  # half of the first two steps, and the last two


def test_a_validation_outside_of_training_is_not_followed(tmp_path: Path, base: str) -> None:
    module = MixtureModule(base, shared=LoRA(rank=1))
    data = MixedTasks(base, toy.toy_tasks(tmp_path), batch_size=5, sampling=Dynamic())
    scores = trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    assert not any(name.startswith("validation_loss") for name in scores[0])
    trainer(tmp_path, num_sanity_val_steps=1, max_steps=1, val_check_interval=2).fit(module, datamodule=data)
    assert data.state_dict()["known"] == {}


def test_a_sampler_that_follows_validations_is_refused_where_there_are_none(tmp_path: Path, base: str) -> None:
    data = MixedTasks(base, toy.toy_tasks(tmp_path), batch_size=5, sampling=Dynamic())
    with pytest.raises(ValueError, match="Dynamic follows validations, and limit_val_batches is 0"):
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(MixtureModule(base, shared=LoRA(rank=1)), data)
