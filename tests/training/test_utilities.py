"""What each expert is worth to each row, as training measures it for the objectives that ask."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moadapt.adapters import LoRA
from moadapt.objectives import UtilityRanking
from moadapt.training import MixedTasks, MixtureModule, Optimization
from moadapt_routers import Softmax
from tests.training import toy
from tests.training.runs import trainer


class Measured(MixtureModule):
    """Keeps a batch and the utilities that training measures for it."""

    kept: Any = None

    def utilities(self, batch: Any) -> Tensor:
        found = super().utilities(batch)
        self.kept = self.kept or (batch, found, self.mixture.training)
        return found


def test_training_measures_what_each_expert_is_worth_to_each_row(tmp_path: Path, base: str) -> None:
    torch.manual_seed(0)
    experts = {name: LoRA(rank=2) for name in ("small", "large")}
    module = Measured(
        base, experts, LoRA(rank=2), Softmax(per="model"), objectives=[UtilityRanking(weight=0.5)],
        optimization=Optimization(),
    )  # fmt: skip
    module.configure_model()
    for parameter in module.roles():
        torch.nn.init.normal_(parameter, std=0.2)
    parameters = {name: p.detach().clone() for name, p in module.mixture.named_adapter_parameters()}
    tasks = MixedTasks(base, toy.toy_tasks(tmp_path, rows=(4, 4)), batch_size=4)
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(module, datamodule=tasks)
    batch, found, training = module.kept
    assert training  # as it was before
    assert run.logged_metrics["objective/utility_ranking"] > 0
    with torch.no_grad():
        for name, p in module.mixture.named_adapter_parameters():
            p.copy_(parameters[name])
    module.mixture.eval()

    def loss_of_row(row: int, weights: dict[str, float]) -> float:
        inputs = {name: tensor[row : row + 1] for name, tensor in batch.inputs.items()}
        with torch.no_grad(), module.mixture.override(weights):
            return float(module.mixture(**inputs, labels=batch.labels[row : row + 1]).loss)

    for row in range(len(found)):
        without = loss_of_row(row, {})
        expected = [without - loss_of_row(row, {name: 1.0}) for name in experts]
        torch.testing.assert_close(found[row], torch.tensor(expected), rtol=1e-3, atol=1e-4)
