"""What gradients task by task cost: step time with copies of the shared adapter and with a pass a task, as ratios.

    python -m tests.bench.task_gradients                  # on one thread: 2, 4 and 8 tasks
    python -m tests.bench.task_gradients --device cuda --size large --dtype bfloat16

A step is forward and backward of the same batch of 8 rows of a Llama-shaped model with a shared LoRA of rank 8 at all
linear layers, alone or beside 8 experts by task; where gradients are told task by task, PCGrad and the writing of its
gradient are part of it. Variants run in turn; each ratio is the median over rounds of paired times.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import moadapt
from moadapt import Mixture
from moadapt.balancing import PCGrad
from moadapt.training.task_gradients import TaskGradients
from moadapt_routers import ByTask
from tests.bench.routing import LORA, SIZES, Size, batch_of, llama

EXPERTS = [f"task{index}" for index in range(8)]
Step = Callable[[], None]


def mixture(size: Size, dtype: torch.dtype, device: str, *, experts: bool) -> Mixture:
    """A shared LoRA, alone or beside eight experts, none of whose numbers is zero."""
    own = {"experts": dict.fromkeys(EXPERTS, LORA), "router": ByTask()} if experts else {}
    made = moadapt.attach(llama(size, dtype).to(device), shared=LORA, **own).train()
    for _, parameter in made.named_adapter_parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return made


def steps(size: Size, dtype: torch.dtype, device: str, tasks: int, *, experts: bool) -> dict[str, Step]:
    """A plain step, and both ways of telling gradients task by task."""
    made = mixture(size, dtype, device, experts=experts)
    inputs = {name: tensor.to(device) for name, tensor in batch_of(size).items()}
    labels, rows = inputs.pop("labels"), torch.arange(size.rows, device=device) % tasks
    named = {"task": [EXPERTS[row] for row in rows.tolist()]} if experts else {}
    balancer, gradients = PCGrad().build(EXPERTS[:tasks], 0), TaskGradients(made.copy_shared(tasks))

    def losses() -> Tensor:
        logits = made(**inputs, **named, use_cache=False).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(logits.mT, labels[:, 1:], reduction="none")
        return each.sum(dim=1)

    def plain() -> None:
        made.zero_grad()
        losses().sum().backward()

    def at_once() -> None:
        made.zero_grad()
        with made.using(gradients.collect(rows)):
            found = losses()
        found.sum().backward()
        gradients.write(balancer.combine(gradients.sum_up(lambda whole: whole), 0), 1.0)
        gradients.clear()

    def one_by_one() -> None:
        made.zero_grad()
        found = losses()
        for task in range(tasks):
            found[rows == task].sum().backward(retain_graph=task < tasks - 1)

    return {"plain": plain, "copies": at_once, "a pass a task": one_by_one}


def ratios(variants: dict[str, Step], rounds: int, device: str) -> dict[str, float]:
    """Median ratio of each variant's time to the plain step's."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 2):
        for name, step in variants.items():
            began = time.perf_counter() if device == "cuda" else time.process_time()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() if device == "cuda" else time.process_time()) - began)
    kept = {name: own[2:] for name, own in times.items()}
    return {n: statistics.median(a / b for a, b in zip(own, kept["plain"], strict=True)) for n, own in kept.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for experts in (False, True):
        for tasks in (2, 4, 8):
            size = replace(SIZES[given.size], rows=8)
            variants = steps(size, getattr(torch, given.dtype), given.device, tasks, experts=experts)
            found = ratios(variants, given.rounds, given.device)
            said = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found.items())
            print(f"{'shared + 8 experts' if experts else 'shared alone'}, {tasks} tasks: {said}", flush=True)


if __name__ == "__main__":
    main()
