"""How long a training step takes, over forward and backward of the frozen base to its input embeddings.

All are run in turn on the same batch; each ratio is the median over rounds of paired times.
"""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from moadapt.training.batch import Batch
from moadapt.training.loss import answer_logits, row_losses
from moadapt.training.module import TaskModule
from moadapt.training.optimization import Optimization, parameter_groups
from moadapt.training.optimizer import ExpertAdamW

_ROUNDS = 7


def step_ratios(modules: Mapping[str, TaskModule], batch: Batch) -> dict[str, float]:
    """Time every module's training step beside the frozen base's.

    Args:
        modules: Trained modules, by name.
        batch: Rows of one step.
    """
    kept = [(p, p.detach().clone()) for module in modules.values() for p in module.roles()]
    steps = {name: _training_step(module, batch) for name, module in modules.items()}
    base_step = _base_step(next(iter(modules.values())), batch)
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(_ROUNDS + 1):
        base = _seconds(base_step)
        for name, step in steps.items():
            seconds = _seconds(step)
            if round_:  # the first round warms up
                ratios[name].append(seconds / base)
    with torch.no_grad():
        for parameter, value in kept:
            parameter.copy_(value)
    return {name: statistics.median(values) for name, values in ratios.items()}


def _training_step(module: TaskModule, batch: Batch) -> Callable[[], None]:
    groups = parameter_groups(module.roles(), Optimization(learning_rate=1e-6))
    optimizer = ExpertAdamW(groups, module.stacks())
    assert module.model is not None, "the module was trained"
    module.model.train()

    def step() -> None:
        optimizer.zero_grad()
        losses, counts = row_losses(answer_logits(module.model, batch, True, **module.options(batch)), batch)
        torch.autograd.backward(losses.sum() / counts.sum())
        optimizer.step()

    return step


def _base_step(module: TaskModule, batch: Batch) -> Callable[[], None]:
    base = module.load_base()
    base.requires_grad_(False)
    embeddings: nn.Module = base.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, args, output: output.requires_grad_(True))

    def step() -> None:
        losses, counts = row_losses(answer_logits(base, batch, True), batch)
        torch.autograd.backward(losses.sum() / counts.sum())

    return step


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
