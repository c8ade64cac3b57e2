"""What families, orthogonality, ranks, cross-modal adapters and placements are worth, in the demo's setting.

    python tests/bench/quality.py run --seeds 0 1 2                # every variant; resumes, and reuses what is done
    python tests/bench/quality.py run --only lora bottleneck       # some of them
    python tests/bench/quality.py table                            # means and spreads, as in docs/results.md

Each run trains adapters on the three tasks of the digit scenes, mixed in every batch, and scores answers on the test
split, whose handwriting no training saw. Within a group all have as many trainable parameters as their shapes allow,
which the table counts; steps, batches, data order and seeds are the same for all. `--rate` trains with another learning
rate, kept beside the first.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch

from moadapt.adapters import LoRA
from moadapt.cli.quiet import quiet
from moadapt.demo.evaluation import evaluate
from moadapt.demo.settings import DemoSettings
from moadapt.demo.training import train_run, write_json
from moadapt.placement import Placement
from moadapt.presets import preset
from moadapt.registry import FAMILIES, OBJECTIVES, RANKS
from moadapt.specs import bind
from moadapt.training import MixedTasks, MixtureModule
from moadapt_routers import ByTask, Softmax

TASKS = ("vqa", "captioning", "grounding")
SCORES = {"vqa/accuracy": "VQA accuracy", "captioning/cider_d": "CIDEr-D", "grounding/accuracy": "box accuracy"}
BOTH_TOWERS = Placement(towers=("vision", "language"))
Choice = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Args:
        group: Its table.
        choice: Gives the arguments of `MixtureModule` that make it what it is.
        rate: Peak learning rate.
    """

    group: str
    choice: Callable[[], Choice]
    rate: float = 1e-2


def alone(name: str, rate: float = 1e-2, **fields: Any) -> Variant:
    """One adapter of a family for all tasks."""
    return Variant("families", lambda: {"shared": bind(FAMILIES.get(name), fields)}, rate)


def experts(make: Callable[[str], Any], **more: Any) -> Choice:
    """One expert a task, chosen by the task that is given."""
    return {"experts": {task: make(task) for task in TASKS}, "router": ByTask(), **more}


def orthogonal(measure: str) -> Choice:
    """Shared and task adapters that shall not overlap."""
    objective = bind(OBJECTIVES.get("orthogonality"), {"measure": measure, "weight": 0.1})
    return experts(lambda task: LoRA(rank=6), shared=LoRA(rank=6), objectives=[objective])


def ranked(name: str, rank: int, **fields: Any) -> Choice:
    """One LoRA whose ranks an allocator sets."""
    return {"shared": LoRA(rank=rank), "ranks": bind(RANKS.get(name), fields)}


def mixture(**more: Any) -> Choice:
    """The demo's mixture, a little smaller."""
    return {"experts": {task: LoRA(rank=6) for task in TASKS}, "shared": LoRA(rank=9), "router": Softmax(), **more}


def crossed(rank: int) -> Any:
    """A cross-modal adapter."""
    return bind(FAMILIES.get("cross_modal"), {"rank": rank})


def with_cross_expert() -> Choice:
    """The mixture with a fourth expert, which is cross-modal."""
    whole = mixture(shared=LoRA(rank=6))
    return {**whole, "experts": {**whole["experts"], "cross": crossed(7)}}


def small_preset(task: str) -> LoRA:
    """A preset at a quarter of its rank, as the base is small."""
    found = preset(task)
    return LoRA(rank=found.rank // 4, alpha=found.rank / 2, placement=found.placement)


VARIANTS: dict[str, Variant] = {
    # about 82 thousand parameters: LoRA of rank 8 at every linear layer of the language tower
    "lora": alone("lora", rank=8),
    "lora, lr_ratio 4": alone("lora", rate=5e-3, rank=8, lr_ratio=4.0),
    "lora, pissa": alone("lora", rank=8, init="pissa"),
    "bottleneck, series": alone("bottleneck", width=39),
    "bottleneck, parallel": alone("bottleneck", width=39, form="parallel"),
    "hydra": alone("hydra", rank=4),
    "prefix": alone("prefix", rate=0.1, length=40, image_length=40),
    "cross_modal": alone("cross_modal", rank=20),
    "peft DoRA": alone("peft", kind="LORA", options={"r": 8, "lora_alpha": 8, "use_dora": True}),
    "prompt_tokens, 32": alone("prompt_tokens", rate=0.1, length=32),
    "bias": alone("bias", rate=0.1, create=True),
    "scale": alone("scale", rate=0.1),
    "norm_tuning": alone("norm_tuning", rate=0.1),
    # about 246 thousand: rank 24 in all
    "one LoRA": Variant("shared and specific", lambda: {"shared": LoRA(rank=24)}),
    "one LoRA a task": Variant("shared and specific", lambda: experts(lambda task: LoRA(rank=8))),
    "shared + one a task": Variant(
        "shared and specific", lambda: experts(lambda task: LoRA(rank=6), shared=LoRA(rank=6))
    ),
    "... deltas orthogonal": Variant("shared and specific", lambda: orthogonal("deltas")),
    "... subspaces orthogonal": Variant("shared and specific", lambda: orthogonal("subspaces")),
    # as many after training; uniform ranks are those of `lora`
    "depth_schedule": Variant("ranks", lambda: ranked("depth_schedule", 8, parameters=81_920)),
    "importance": Variant("ranks", lambda: ranked("importance", 12, budget=81_920, unit="parameters")),
    # about 277 thousand and a router
    "mixture": Variant("cross-modal", mixture),
    "... shared is cross_modal": Variant("cross-modal", lambda: mixture(shared=crossed(22))),
    "... a cross_modal expert": Variant("cross-modal", with_cross_expert),
    # about 170 thousand: each task's preset at a quarter of its rank, against all blocks of both towers
    "presets": Variant("placement", lambda: experts(small_preset)),
    "all sites": Variant("placement", lambda: experts(lambda task: LoRA(rank=3), placement=BOTH_TOWERS)),
    "language tower": Variant("placement", lambda: experts(lambda task: LoRA(rank=5))),
}


def run(
    name: str,
    variant: Variant,
    settings: DemoSettings,
    data: MixedTasks,
    rate: float | None,
    out: Path,
    more: Callable[[MixtureModule, Path], Record] = lambda module, folder: {},
) -> None:
    """Train and score one run, or leave what is done.

    Args:
        name: Of the variant.
        variant: What it is.
        settings: Steps, rows, and the seed of data order and adapters.
        data: The rows.
        rate: Another peak learning rate than the variant's.
        out: Folder of all runs.
        more: Finds what else goes into its record, and may keep files in its folder.
    """
    seed, chosen = settings.seed, variant.rate if rate is None else rate
    folder = out / slug(name) / f"{chosen:g}" / str(seed)
    key = settings.key() | {"variant": name, "rate": chosen}
    lightning.seed_everything(seed, verbose=False)
    module = MixtureModule(**replace(settings, learning_rate=chosen).run_options(), **variant.choice())
    trained = train_run(name, module, data, key, settings.steps, folder)
    count = sum(p.numel() for p in module.finish().parameters() if p.requires_grad)
    found = evaluate(module, data, key, folder / "answers.json")
    scores = {score: found["scores"][score] for score in SCORES}
    record = {
        "name": name,
        "seed": seed,
        "rate": chosen,
        "steps": settings.steps,
        "parameters": count,
        "scores": scores,
    }
    write_json(folder / "record.json", record | {"seconds": trained["seconds"]} | more(module, folder))


def prepared(seed: int, steps: int) -> tuple[DemoSettings, MixedTasks]:
    """Return the demo's settings and rows."""
    settings = DemoSettings(seed=seed, steps=steps)
    data = settings.data_module()
    data.prepare_data()
    data.setup("fit")
    data.setup("predict")
    return settings, data


def slug(name: str) -> str:
    """Return a variant's name as a folder."""
    return "-".join("".join(c if c.isalnum() or c == "_" else " " for c in name).split())


def records(out: Path) -> list[dict[str, Any]]:
    """Return the records of all finished runs."""
    return [json.loads(file.read_text()) for file in sorted(out.glob("*/*/*/record.json"))]


def table(found: Iterable[Mapping[str, Any]]) -> str:
    """Return a table a group, one row a variant and learning rate, mean and standard deviation over seeds."""
    rows: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for record in found:
        if record["name"] in VARIANTS:
            rows.setdefault((record["name"], record["rate"]), []).append(record)
    lines, group = [], ""
    for name, variant in VARIANTS.items():
        for (_, rate), runs in sorted(item for item in rows.items() if item[0][0] == name):
            if variant.group != group:
                group = variant.group
                heads = ["variant", "rate", "trained", *SCORES.values(), "seeds"]
                lines += ["", f"**{group}**", "", f"| {' | '.join(heads)} |"]
                lines.append("|---" * len(heads) + "|")
            cells = [spread([run["scores"][score] for run in runs], 2 if "cider" in score else 3) for score in SCORES]
            lines.append(f"| {name} | {rate:g} | {runs[0]['parameters']:,} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    """Return mean and standard deviation in words; of a single value, the value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def parser_of(about: str, names: Iterable[str], out: str) -> argparse.ArgumentParser:
    """Return what parses the options that all measurements of quality have.

    Args:
        about: What is measured.
        names: Of all variants.
        out: Where runs go by default.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("do", choices=["run", "table"])
    parser.add_argument("--only", nargs="+", choices=list(names), default=list(names))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def main() -> None:
    """Run variants, or print the table."""
    parser = parser_of("Quality of adapters in the demo's setting.", VARIANTS, "runs/quality")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float)
    given = parser.parse_args()
    quiet()
    if given.do == "run":
        torch.set_num_threads(given.threads)
        for seed in given.seeds:
            settings, data = prepared(seed, given.steps)
            for name in given.only:
                run(name, VARIANTS[name], settings, data, given.rate, given.out)
    print(table(records(given.out)))


if __name__ == "__main__":
    main()
