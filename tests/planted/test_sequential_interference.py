"""Two tasks in turn, on different 4-dimensional subspaces of 32 inputs: the second adapter joins the frozen first.

The penalty `0.5 |A_new A_old^T|^2` keeps the second adapter from reading what the first reads. That protects the first
task as far as the first adapter's rows span its inputs and nothing else. Gradient descent with a little decay makes
them so; Adam, which scales every coordinate by itself, leaves the span, and protects less.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moadapt import Routing
from moadapt.objectives import Orthogonality
from tests.planted.toy import OneSite, orthonormal

WIDE, NARROW, INNER, SAMPLES, STEPS, SEEDS = 32, 16, 4, 64, 2000, 4
BOTH = Routing.constant(torch.ones(2))
OPTIMIZERS = {"descent": torch.optim.SGD, "adamw": torch.optim.AdamW}
SETTINGS = {
    "descent": {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-3},
    "adamw": {"lr": 1e-2, "weight_decay": 0.3},
}


def run(seed: int, weight: float, optimizer: str) -> tuple[float, float]:
    """Return the relative errors on the first and on the second task after both were learned."""
    torch.manual_seed(seed)
    inner = [orthonormal(INNER, WIDE) for _ in range(2)]
    inputs = [torch.randn(SAMPLES, INNER) @ rows for rows in inner]
    targets = [x @ rows.T @ orthonormal(INNER, NARROW) for x, rows in zip(inputs, inner, strict=True)]
    toy, apart = OneSite({"old": INNER, "new": INNER}, WIDE, NARROW), Orthogonality(measure="raw")

    def output(task: int, routing: Routing) -> Tensor:
        found: Tensor = toy.bank(inputs[task], torch.zeros_like(targets[task]), routing)
        return found

    def error(task: int) -> float:
        apart = output(task, BOTH) - targets[task]
        return (apart.square().sum() / targets[task].square().sum()).item()

    def learn(loss: Callable[[], Tensor]) -> None:
        trained = [p for p in toy.bank.parameters() if p.requires_grad]
        steps = OPTIMIZERS[optimizer](trained, **SETTINGS[optimizer])
        for _ in range(STEPS):
            steps.zero_grad()
            loss().backward()
            steps.step()

    only_old = Routing.constant(torch.tensor([1.0, 0.0]))
    fresh = toy.bank.state("new")
    learn(lambda: (output(0, only_old) - targets[0]).square().mean())
    toy.bank.load_state("new", fresh)  # decay acts on it though no gradient does
    toy.bank.freeze("old")
    learn(lambda: (output(1, BOTH) - targets[1]).square().mean() + weight * apart.value(toy))
    return error(0), error(1)


@pytest.mark.slow
def test_the_second_task_leaves_the_first_alone_where_its_adapter_is_kept_apart() -> None:
    runs = {
        (optimizer, weight): [run(seed, weight, optimizer) for seed in range(SEEDS)]
        for optimizer in OPTIMIZERS
        for weight in (0.0, 0.5)
    }
    for (optimizer, weight), errors in runs.items():
        print(optimizer, f"weight {weight}:", *(f"first {first:.4f}, second {second:.4f};" for first, second in errors))
    first = {case: [errors[0] for errors in found] for case, found in runs.items()}
    for optimizer in OPTIMIZERS:
        assert min(first[optimizer, 0.0]) > 0.1
        assert max(second for weight in (0.0, 0.5) for _, second in runs[optimizer, weight]) < 0.01
    assert max(first["descent", 0.5]) < 0.001
    assert max(first["adamw", 0.5]) < 0.5 * min(first["adamw", 0.0])
    assert min(first["adamw", 0.5]) > 10 * max(first["descent", 0.5])
