"""Twelve tasks of very different sizes: what samplers and balance between tasks are worth.

    python -m tests.bench.unbalanced run --seeds 0                # every variant; resumes, and reuses what is done
    python -m tests.bench.unbalanced run --only uniform pcgrad    # some of them
    python -m tests.bench.unbalanced table                        # as in docs/results.md

The twelve tasks about digit scenes of `tests.bench.composition`, the largest with 2,000 training rows and the smallest
with 20; which is which turns with the seed. One mixture learns them all: a shared LoRA and one a task, which is told.
Bounds are `proportional`, where nobody helps the small tasks, and `every row`, where all tasks have 2,000. Scores are
shares of right answers to held-out rows, whose handwriting no training saw.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from moadapt.adapters import LoRA
from moadapt.balancing import Balance
from moadapt.cli.quiet import quiet
from moadapt.demo.evaluation import evaluate
from moadapt.demo.settings import DemoSettings
from moadapt.demo.training import train_run, write_json
from moadapt.registry import BALANCES, SAMPLERS
from moadapt.specs import bind
from moadapt.task import BadExample, Example
from moadapt.training import MixedTasks, MixtureModule
from moadapt_routers import ByTask
from tests.bench.composition import ROWS, Part, twelve
from tests.bench.quality import parser_of, slug, spread

STEPS, BATCH, LEAST = 300, 36, 20


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Args:
        sampler: Short name and fields of the sampler.
        balance: Short name and fields of the balance method, if any.
        whole: Whether every task has all of its rows.
    """

    sampler: tuple[str, Mapping[str, Any]]
    balance: tuple[str, Mapping[str, Any]] | None = None
    whole: bool = False


PROPORTIONAL: tuple[str, Mapping[str, Any]] = ("proportional", {})
VARIANTS = {
    "every row": Variant(("uniform", {}), whole=True),
    "proportional": Variant(PROPORTIONAL),
    "temperature 2": Variant(("temperature", {"temperature": 2.0})),
    "temperature 5": Variant(("temperature", {"temperature": 5.0})),
    "uniform": Variant(("uniform", {})),
    "annealed": Variant(("annealed", {"start": 1.0, "end": 5.0, "steps": STEPS})),
    "capped": Variant(("capped", {"cap": 200})),
    "round_robin": Variant(("round_robin", {})),
    "dynamic": Variant(("dynamic", {})),
    "fixed": Variant(PROPORTIONAL, ("fixed", {"weights": {}})),
    "uncertainty": Variant(PROPORTIONAL, ("uncertainty", {})),
    "dynamic_average": Variant(PROPORTIONAL, ("dynamic_average", {})),
    "gradnorm": Variant(PROPORTIONAL, ("gradnorm", {})),
    "pcgrad": Variant(PROPORTIONAL, ("pcgrad", {})),
    "cagrad": Variant(PROPORTIONAL, ("cagrad", {})),
}


@dataclass(frozen=True, kw_only=True)
class Few(Part):
    """A part with fewer training rows.

    Args:
        rows: How many, the first ones.
    """

    rows: int

    def read(self, split: str) -> tuple[list[Example], list[BadExample]]:
        """Read the rows."""
        found, bad = super().read(split)
        return found[: self.rows] if split == "train" else found, bad


def sizes_of(names: Sequence[str], seed: int) -> dict[str, int]:
    """Return how many training rows each task has: in equal ratios from all down to `LEAST`, turned by the seed."""
    most, last = ROWS["train"], len(names) - 1
    sizes = [round(most * (LEAST / most) ** (place / last)) for place in range(len(names))]
    return {name: sizes[(place + 5 * seed) % len(names)] for place, name in enumerate(names)}


def balance_of(name: str, given: Mapping[str, Any], sizes: Mapping[str, int]) -> Balance:
    """Return a balance method; fixed weights make up for the sizes, so that all tasks have the same say."""
    mean = statistics.mean(sizes.values())
    weights = {"weights": {task: mean / size for task, size in sizes.items()}} if name == "fixed" else {}
    found: Balance = bind(BALANCES.get(name), {**given, **weights})
    return found


def run(name: str, tasks: Mapping[str, Part], seed: int, steps: int, out: Path) -> None:
    """Train and score one variant, if that is still to be done."""
    folder, variant, key = out / str(seed) / slug(name), VARIANTS[name], {"seed": seed, "steps": steps, "name": name}
    record = folder / "record.json"
    if record.is_file() and json.loads(record.read_text())["key"] == key:
        return
    sizes = sizes_of(list(tasks), seed)
    given = {task: part if variant.whole else few(part, sizes[task]) for task, part in tasks.items()}
    sampler, fields = variant.sampler
    data = MixedTasks(
        DemoSettings().base, given, None, BATCH, 64, sampling=bind(SAMPLERS.get(sampler), fields), seed=seed
    )
    data.setup("fit")
    data.setup("predict")
    module = MixtureModule(
        experts={task: LoRA(rank=2) for task in tasks},
        shared=LoRA(rank=8),
        router=ByTask(),
        balance=None if variant.balance is None else balance_of(*variant.balance, sizes),
        **DemoSettings().run_options() | {"seed": seed},
    )
    train_run(name, module, data, key, steps, folder, validate_every=steps // 10 if data.sampler.reads else None)
    found = evaluate(module, data, key, folder / "answers.json")["scores"]
    scores = {task: found[f"{task}/{part.primary}"] for task, part in tasks.items()}
    write_json(record, {"key": key, "sizes": sizes, "scores": scores})


def few(part: Part, rows: int) -> Few:
    """Return a part with its first training rows alone."""
    return Few(**{field.name: getattr(part, field.name) for field in fields(part)}, rows=rows)


def table(out: Path) -> str:
    """Return the table, mean and standard deviation over seeds."""
    found = [json.loads(file.read_text()) for file in out.glob("*/*/record.json")]
    heads = ["", "mean", "worst task", "four smallest", "four largest", "seeds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in VARIANTS:
        runs = [each for each in found if each["key"]["name"] == name]
        if runs:
            ranked = [[each["scores"][task] for task in sorted(each["sizes"], key=each["sizes"].get)] for each in runs]
            parts = [
                [statistics.mean(scores) for scores in ranked],
                [min(scores) for scores in ranked],
                [statistics.mean(scores[:4]) for scores in ranked],
                [statistics.mean(scores[-4:]) for scores in ranked],
            ]
            lines.append(f"| {name} | {' | '.join(spread(part, 3) for part in parts)} | {len(runs)} |")
    return "\n".join(lines)


def main() -> None:
    """Run, or print the table."""
    parser = parser_of("Twelve tasks of very different sizes.", VARIANTS, "runs/unbalanced")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    quiet()
    if given.do == "run":
        torch.set_num_threads(given.threads)
        tasks = twelve()
        for seed in given.seeds:
            for name in given.only:
                run(name, tasks, seed, given.steps, given.out)
    print(table(given.out))


if __name__ == "__main__":
    main()
