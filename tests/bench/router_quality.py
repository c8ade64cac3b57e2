"""What routers are worth in the demo's setting: scores, cost, how sharp they are, and what merging them costs.

    python -m tests.bench.router_quality run --seeds 0           # every router; resumes, and reuses what is done
    python -m tests.bench.router_quality run --only softmax top_k --seeds 0 1 2
    python -m tests.bench.router_quality table                   # as in docs/results.md

All have one LoRA of rank 8 a task and a shared one of rank 4, and train for the same steps on the same rows. Bounds are
`by_task`, which is told the task in use as well, `constant`, which does not route, and one LoRA of as many parameters.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from moadapt.adapters import LoRA
from moadapt.cli.quiet import quiet
from moadapt.demo.evaluation import evaluate
from moadapt.demo.plain import PlainModule
from moadapt.demo.settings import DemoSettings
from moadapt.demo.step_ratio import step_ratios
from moadapt.registry import OBJECTIVES, ROUTERS
from moadapt.routed import routed_at
from moadapt.specs import bind
from moadapt.training import MixedTasks, MixtureModule
from tests.bench.quality import SCORES, TASKS, Choice, Record, Variant, parser_of, prepared, records, run, slug, spread

CALIBRATION = 6


def routed(router: str, objectives: Mapping[str, float] | None = None, **fields: Any) -> Variant:
    """One LoRA a task and a shared one behind a router.

    Args:
        router: Short name.
        objectives: Their weights, by short name.
        fields: Of the router.
    """

    def choice() -> Choice:
        named = {name: bind(OBJECTIVES.get(name), {"weight": weight}) for name, weight in (objectives or {}).items()}
        return {
            "experts": {task: LoRA(rank=8) for task in TASKS},
            "shared": LoRA(rank=4),
            "router": bind(ROUTERS.get(router), fields),
            "objectives": list(named.values()),
        }

    return Variant("routers", choice)


BALANCED, TAUGHT = {"load_balance": 0.01}, {"task_cross_entropy": 0.1}
VARIANTS: dict[str, Variant] = {
    "by_task": routed("by_task"),
    "constant": routed("constant"),
    "one LoRA": Variant("routers", lambda: {"shared": LoRA(rank=28)}),
    "softmax": routed("softmax"),
    "softmax, token": routed("softmax", scope="token"),
    "softmax, model": routed("softmax", per="model"),
    "softmax, sharpened": routed("softmax", end_temperature=0.2),
    "top_k": routed("top_k"),
    "top_k, token": routed("top_k", BALANCED, scope="token"),
    "top_k, noise": routed("top_k", BALANCED, noise=1.0, end_noise=0.0),
    "sparsemax": routed("sparsemax"),
    "top_p": routed("top_p"),
    "switch": routed("switch", BALANCED),
    "switch, token": routed("switch", BALANCED, scope="token"),
    "prompt_mlp": routed("prompt_mlp"),
    "hard_to_soft": routed("hard_to_soft", TAUGHT),
    "meteora": routed("meteora", TAUGHT),
    "scenario": routed("scenario", TAUGHT),
    "remix": routed("remix", BALANCED, k=1),
    "poly": routed("poly"),
    "poly, 4 heads": routed("poly", heads=4),
    "task_embedding": routed("task_embedding"),
    "typed, token": routed("typed", scope="token", types=("text", "image", "any")),
    "threshold": routed("threshold"),
    "fusion": routed("fusion", scope="token", per="site"),
}


def measured(settings: DemoSettings, data: MixedTasks, module: MixtureModule, folder: Path) -> Record:
    """Return entropy and load of the routing, step ratio, and scores of the mixture merged into one model."""
    mixture = module.mixture.eval()
    found: Record = {"entropy": None, "load": None, "merged": None}
    found["step"] = step_ratios({"it": module}, next(iter(data.train_dataloader())))["it"]
    if not mixture.places:
        return found
    entropies, loads, blends = [], [], False
    for batch in islice(data.predict_dataloader(), 0, None, 4):
        with torch.no_grad(), mixture.observe() as observed:
            mixture(**batch.inputs, **module.options(batch))
        for each in observed:
            blends = blends or each.routing.combines == "parameters"
            inputs = routed_at(each, mixture.experts, mixture.tasks)
            shares = inputs.weights / inputs.weights.sum(-1, keepdim=True).clamp(min=1e-12)
            entropies.append(-(shares * shares.clamp(min=1e-12).log()).sum(-1).mean())
            loads.append(shares.mean(dim=0))
    found["entropy"] = float(torch.stack(entropies).mean())
    found["load"] = torch.stack(loads).mean(dim=0).tolist()
    if blends:  # what blends parameters has no average
        return found
    batches = [
        {**batch.inputs, "labels": batch.labels, "task": list(batch.task_names)}
        for batch in islice(data.train_dataloader(), CALIBRATION)
    ]
    plain, _ = mixture.merge("mean_routing", calibration=batches)
    answers = evaluate(PlainModule(dict.fromkeys(TASKS, plain)), data, settings.key(), folder / "merged.json")
    found["merged"] = {score: answers["scores"][score] for score in SCORES}
    return found


def table(found: Sequence[Record]) -> str:
    """Return the table, one row a router, mean and standard deviation over seeds."""
    heads = [
        "router",
        *SCORES.values(),
        "step",
        "trained",
        "entropy",
        *(f"merged {s}" for s in SCORES.values()),
        "seeds",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in VARIANTS:
        runs = [record for record in found if record["name"] == name]
        if not runs:
            continue
        cells = [spread([each["scores"][score] for each in runs], digits(score)) for score in SCORES]
        cells += [f"{runs[0]['step']:.2f}", f"{runs[0]['parameters']:,}"]
        cells.append("" if runs[0]["entropy"] is None else spread([each["entropy"] for each in runs], 2))
        merges = runs[0]["merged"] is not None
        cells += [spread([each["merged"][s] for each in runs], digits(s)) if merges else "" for s in SCORES]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


def digits(score: str) -> int:
    """Return how many digits a score is worth."""
    return 2 if "cider" in score else 3


def main() -> None:
    """Run routers, or print the table."""
    parser = parser_of("Quality of routers in the demo's setting.", VARIANTS, "runs/routers")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    quiet()
    if given.do == "run":
        torch.set_num_threads(given.threads)
        for seed in given.seeds:
            settings, data = prepared(seed, given.steps)
            for name in given.only:
                if not list((given.out / slug(name)).glob(f"*/{seed}/record.json")):
                    run(name, VARIANTS[name], settings, data, None, given.out, partial(measured, settings, data))
    print(table(records(given.out)))


if __name__ == "__main__":
    main()
