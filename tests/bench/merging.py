"""What merge methods make of the demo's mixture, and of token-routed linear experts alone.

    python tests/bench/merging.py demo --seeds 0 1 2    # trains the mixture unless it is there, merges, scores; resumes
    python tests/bench/merging.py table                 # means and spreads, as in docs/results.md
    python tests/bench/merging.py toy                   # one site, planted inputs: errors by method and number of rows

A row's mean is that of the three tasks' main scores, each relative to the routed mixture's. Calibration rows are
training rows; scores are of the test split.
"""

import argparse
import json
import statistics
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moadapt.cli.quiet import quiet
from moadapt.demo.evaluation import evaluate
from moadapt.demo.plain import PlainModule
from moadapt.demo.settings import MIXTURE, DemoSettings
from moadapt.demo.training import train_run, write_json
from moadapt.merging.factored import Factored
from moadapt.merging.least_squares import nearest_weights
from moadapt.merging.regression import nearest_map
from moadapt.merging.statistics import SiteStatistics
from moadapt.training import MixtureModule

SCORES = {"vqa/accuracy": "VQA accuracy", "captioning/cider_d": "CIDEr-D", "grounding/accuracy": "box accuracy"}
METHODS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "mean_routing": {},
    "least_squares": {},
    "regression": {},
    "regression, rank 8": {"rank": 8},
    "distillation": {},
    "distillation, 400 steps": {"steps": 400},
    "distillation, from regression": {"start": "regression", "steps": 400},
    "task_arithmetic": {},
    "ties": {"density": 0.2},
    "dare": {"density": 0.5},
    "magnitude": {"density": 0.2},
    "knots": {"density": 0.5},
    "regmean": {},
    "lorahub": {},
}
PER_TASK = ("mean_routing", "least_squares", "regression", "distillation")
BATCHES = 8
"""Of calibration: half of them to merge from, half to measure on."""


def demo(seeds: list[int], out: Path, only: list[str]) -> None:
    """Score every merge of every seed's mixture."""
    for seed in seeds:
        settings, folder = DemoSettings(seed=seed), out / str(seed)
        data = settings.data_module()
        data.prepare_data()
        data.setup("fit")
        data.setup("predict")
        module = settings.modules(data.tasks)[MIXTURE]
        assert isinstance(module, MixtureModule)
        train_run(MIXTURE, module, data, settings.key(), settings.steps, folder / "runs" / MIXTURE)
        module.mixture.eval()
        evaluate(module, data, settings.key(), folder / "answers" / "mixture.json")
        key = {**settings.key(), "batches": BATCHES}
        rows = [
            {**b.inputs, "labels": b.labels, "task": list(b.task_names)}
            for b in islice(data.train_dataloader(), BATCHES)
        ]
        for name in only or [*METHODS, *(f"{each} per task" for each in PER_TASK)]:
            file = folder / "answers" / f"{name}.json"
            options = METHODS[name.removesuffix(" per task")]
            if file.is_file() and json.loads(file.read_text()).get("key") == key | {"options": options}:
                continue
            groups = [(task,) for task in data.tasks] if name.endswith("per task") else [()]
            models, reports = {}, []
            for group in groups:
                method = name.split(",")[0].removesuffix(" per task")
                model, report = module.mixture.merge(method, calibration=rows, tasks=group, **options)
                models |= dict.fromkeys(group or data.tasks, model)
                reports.append(json.loads(report.to_json()))
            evaluate(PlainModule(models), data, key | {"options": options}, file)
            write_json(folder / "reports" / f"{name}.json", {"reports": reports})


def table(out: Path) -> None:
    """Print means and spreads over seeds."""
    folders = sorted(out.iterdir())
    routed = [scores(folder / "answers" / "mixture.json") for folder in folders]
    print("| merge | VQA accuracy | CIDEr-D | box accuracy | of the mixture's | output error | held out | KL | top-1 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in ("mixture", *(f"{each} per task" for each in PER_TASK), *METHODS):
        files = [folder / "answers" / f"{name}.json" for folder in folders]
        if not all(file.is_file() for file in files):
            continue
        found = [scores(file) for file in files]
        shares = [statistics.fmean(a[k] / b[k] for k in SCORES) for a, b in zip(found, routed, strict=True)]
        cells = [spread([each[key] for each in found], 3 if "cider" not in key else 2) for key in SCORES]
        told = [folder / "reports" / f"{name}.json" for folder in folders]
        measured = [mean_report(file) for file in told] if all(file.is_file() for file in told) else []
        more = [spread([each[key] for each in measured], 3) for key in measured[0]] if measured else ["-"] * 4
        print("|", " | ".join([f"`{name}`", *cells, spread(shares, 3), *more]), "|")


def scores(file: Path) -> dict[str, float]:
    """Read the scores of an evaluation."""
    found: dict[str, float] = json.loads(file.read_text())["scores"]
    return found


def mean_report(file: Path) -> dict[str, float]:
    """Return the means of what merges say of themselves."""
    reports = json.loads(file.read_text())["reports"]
    found: dict[str, float] = {}
    for part in ("outputs", "held_out_outputs"):
        found[part] = statistics.fmean(error for each in reports for error in each[part].values())
    return found | {part: statistics.fmean(each[part] for each in reports) for part in ("output_kl", "top1")}


def spread(values: list[float], digits: int) -> str:
    """Write a mean and a standard deviation."""
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.pstdev(values):.{digits}f}"


def toy(seeds: list[int]) -> None:
    """Print errors of one site's merges, token-routed, on their own rows and on 4096 others."""
    print("| rows | method | own rows | other rows |")
    print("|---|---|---|---|")
    for rows in (16, 64, 256, 4096):
        found: dict[str, list[tuple[float, float]]] = {}
        for seed in seeds:
            for name, pair in toy_errors(rows, seed).items():
                found.setdefault(name, []).append(pair)
        for name, pairs in found.items():
            own, other = (statistics.fmean(pair[i] for pair in pairs) for i in (0, 1))
            print(f"| {rows} | `{name}` | {own:.3f} | {other:.3f} |")


def toy_errors(
    rows: int, seed: int, width: int = 16, experts: int = 4, rank: int = 2
) -> dict[str, tuple[float, float]]:
    """Return relative output errors on the rows that a merge was made from and on others.

    Tokens lie in as many clusters as there are linear experts of random factors, and a softmax knows the clusters.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    terms = Factored(
        drawn(experts * rank, width) / width**0.5,
        drawn(experts * rank, width) / rank**0.5,
        torch.zeros(experts * rank),
        torch.arange(experts).repeat_interleave(rank),
    )
    centres = drawn(experts, width)
    own, others = (centres[torch.arange(count) % experts] + 0.5 * drawn(count, width) for count in (rows, 4096))
    found = SiteStatistics.empty(terms, with_inputs=True)
    found.add(own, (own @ centres.T).softmax(-1))
    found = found.averaged()
    found.inputs = (own.T @ own / len(own)).double()
    mean = (own @ centres.T).softmax(-1).mean(0)
    weights = nearest_weights(found, mean)
    inner: Mapping[str, Tensor] = {
        "mean_routing": mean[terms.owner].unsqueeze(1) * terms.down,
        "least_squares": weights[terms.owner].unsqueeze(1).float() * terms.down,
        "regression, ridge 0": nearest_map(found, weights, 0.0).float(),
        "regression, ridge 0.01": nearest_map(found, weights, 0.01).float(),
        "regression, ridge 1": nearest_map(found, weights, 1.0).float(),
    }

    def error(x: Tensor, down: Tensor) -> float:
        routed = ((x @ terms.down.T) * (x @ centres.T).softmax(-1)[:, terms.owner]) @ terms.up
        return float((routed - (x @ down.T) @ terms.up).norm() / routed.norm())

    return {name: (error(own, down), error(others, down)) for name, down in inner.items()}


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("demo", "table", "toy"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/merging"))
    parser.add_argument("--only", nargs="+", default=[])
    given = parser.parse_args()
    quiet()
    if given.command == "demo":
        demo(given.seeds, given.out, given.only)
    elif given.command == "table":
        table(given.out)
    else:
        toy(given.seeds)


if __name__ == "__main__":
    main()
