"""Mixtures of token-routed LoRAs, and rows that name their tasks."""

from typing import Any

import torch

import moadapt
from moadapt.adapters import LoRA
from moadapt.adapters.delta import Delta
from moadapt.merging.method import MergeMethod, Merging
from moadapt.merging.statistics import adapters_of
from moadapt.mixture import Mixture
from moadapt.registry import MERGES
from moadapt.router import RouterSpec
from moadapt_routers import Softmax
from tests.models import llava_batch, randomize, tiny_llava

TASKS = ("vqa", "captioning", "grounding")
WHOLE = {"density": 1.0, "shrinkage": 1.0}
"""Options with which nothing is thrown away, for the methods that have them."""


def mixture_of(*names: str, router: RouterSpec | None = None, shared: bool = True) -> Mixture:
    mixture = moadapt.attach(
        tiny_llava(),
        shared=LoRA(rank=2) if shared else None,
        experts={name: LoRA(rank=2 + i, alpha=3 + i) for i, name in enumerate(names)},
        router=router or Softmax(scope="token"),
    )
    randomize(mixture, 0.15)
    return mixture.eval()


def rows_of(*names: str, count: int = 2, rows: int = 6) -> list[dict[str, Any]]:
    tasks = [names[i % len(names)] for i in range(rows)]
    return [{**llava_batch(rows=rows, seed=seed), "task": tasks} for seed in range(count)]


def method_of(name: str, **options: Any) -> MergeMethod:
    """A method with those of the options that it has."""
    part = MERGES.get(name)
    found: MergeMethod = part(**{key: value for key, value in options.items() if key in part.__dataclass_fields__})
    return found


def change_of(deltas: Any) -> torch.Tensor:
    """The whole change of a site's weight."""
    total: torch.Tensor = sum(delta.weight().double() for delta in deltas)
    return total


def changes(method: MergeMethod, mixture: Mixture, rows: Any = (), tasks: Any = ()) -> dict[str, list[Delta]]:
    merge = method.prepare(Merging(mixture, tuple(tasks), rows))
    return {at.site.path: list(merge(at)) for at in adapters_of(mixture)}
