"""Twelve LoRAs trained apart on twelve tasks, put behind a router that is not told the task.

    python -m tests.bench.composition run --seeds 0 1 2     # trains, composes, fits or trains routers; resumes
    python -m tests.bench.composition table                 # as in docs/results.md

The tasks are about digit scenes: kinds of questions, answers in words, denied or said twice, and boxes. Each LoRA sees
its own task's rows alone. Then adapters stay frozen; routers are fitted to examples, or trained on rows of all tasks.
The bounds are `by_task`, each row's own adapter, and `constant`, the average of all outputs. Scores are shares of right
answers to held-out rows, whose handwriting no training saw.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
from torchmetrics import Metric

import moadapt
from moadapt.adapters import LoRA
from moadapt.bases import load_base
from moadapt.cli.quiet import quiet
from moadapt.demo.evaluation import evaluate
from moadapt.demo.plain import PlainModule
from moadapt.demo.settings import DemoSettings
from moadapt.demo.training import train_run, write_json
from moadapt.mixture import Mixture
from moadapt.registry import DATASETS, OBJECTIVES, ROUTERS
from moadapt.router import RouterSpec
from moadapt.routing_regret import routing_regret
from moadapt.specs import bind
from moadapt.task import BadExample, Example, Task
from moadapt.training import MixedTasks, MixtureModule
from moadapt.training.batch import Batch
from moadapt_tasks.digit_scenes.questions import NUMBERS
from tests.bench.quality import parser_of, slug, spread

ROWS = {"train": 2000, "validation": 16, "test": 40}
STEPS, ROUTER_STEPS, EXAMPLES = 250, 150, 16
Change = Callable[[str], str]


def same(text: str) -> str:
    """Leave a text as it is."""
    return text


def in_words(answer: str) -> str:
    """Write a number as a word."""
    return NUMBERS[int(answer)] if answer.isdigit() and int(answer) < len(NUMBERS) else answer


@dataclass(frozen=True, kw_only=True)
class Part(Task):
    """Some rows of a task, asked and answered in another way.

    Args:
        of: The task.
        keep: Tells by the prompt which rows.
        ask: Changes the prompt.
        answer: Changes the answer.
    """

    of: Task
    keep: Callable[[str], bool]
    ask: Change = same
    answer: Change = same
    primary: ClassVar[str] = "accuracy"

    @property
    def max_new_tokens(self) -> int:  # type: ignore[override]
        """Longest answer to generate."""
        return self.of.max_new_tokens

    def read(self, split: str) -> tuple[list[Example], list[BadExample]]:
        """Read the rows and change them."""
        rows, bad = self.of.read(split)
        chosen = [self._changed(row) for row in rows if self.keep(row.prompt)]
        return chosen[: ROWS[split]], bad

    def parse(self, text: str, example: Example) -> Any:
        """Parse as the task does."""
        return self.of.parse(text, example)

    def metrics(self) -> dict[str, Metric]:
        """Score as the task does."""
        return self.of.metrics()

    def _changed(self, row: Example) -> Example:
        reference = row.reference
        if isinstance(reference, list) and all(isinstance(each, str) for each in reference):
            reference = [self.answer(each) for each in reference]
        answers = tuple(self.answer(each) for each in row.answers)
        return replace(row, prompt=self.ask(row.prompt), answers=answers, reference=reference)


def twelve() -> dict[str, Task]:
    """Return the tasks."""
    settings = DemoSettings()
    found = bind(DATASETS.get(settings.data), settings.data_options).prepare()
    vqa, boxes = found["vqa"], found["grounding"]

    def questions(*starts: str, **more: Any) -> Part:
        return Part(of=vqa, keep=lambda prompt: prompt.startswith(starts), **more)

    other = {"yes": "no", "no": "yes"}
    return {
        "digit": questions("what digit"),
        "color": questions("what color"),
        "count": questions("how many digits"),
        "count_color": Part(of=vqa, keep=lambda p: p.startswith("how many") and not p.startswith("how many digits")),
        "existence": questions("is there"),
        "beside": questions("what is left", "what is right"),
        "over": questions("what is above", "what is below"),
        "digit_word": questions("what digit", ask=lambda p: f"write the word: {p}", answer=in_words),
        "count_word": questions("how many", ask=lambda p: f"count in words: {p}", answer=in_words),
        "denied": questions("is there", ask=lambda p: f"say the other: {p}", answer=lambda a: other.get(a, a)),
        "color_twice": questions("what color", ask=lambda p: f"say two words: {p}", answer=lambda a: f"{a} {a}"),
        "box": Part(of=boxes, keep=lambda prompt: True),
    }


def data_of(tasks: Mapping[str, Task], seed: int, batch_size: int) -> MixedTasks:
    """Return the rows of some tasks."""
    data = MixedTasks(DemoSettings().base, dict(tasks), None, batch_size, 64, "uniform", seed=seed)
    data.setup("fit")
    data.setup("predict")
    return data


def router_of(router: str, **fields: Any) -> RouterSpec:
    """Return a router by short name."""
    spec: RouterSpec = bind(ROUTERS.get(router), fields)
    return spec


FITTED: dict[str, RouterSpec] = {
    "by_task (oracle)": router_of("by_task"),
    "constant (average)": router_of("constant"),
    "constant (sum)": router_of("constant", weights=(1.0,) * 12),
    "arrow": router_of("arrow"),
    "spectral": router_of("spectral"),
    "prototypes": router_of("prototypes", k=1),
    "prototypes, k 2": router_of("prototypes", k=2),
    "lorahub": router_of("lorahub"),
}
BALANCED, TAUGHT = {"load_balance": 0.01}, {"task_cross_entropy": 0.5}
TRAINED: dict[str, tuple[RouterSpec, Mapping[str, float]]] = {
    "softmax": (router_of("softmax"), {}),
    "softmax, taught": (router_of("softmax"), TAUGHT),
    "top_k": (router_of("top_k"), BALANCED),
    "top_k, taught": (router_of("top_k", k=1), TAUGHT),
    "sparsemax": (router_of("sparsemax"), {}),
    "top_p": (router_of("top_p"), {}),
    "switch": (router_of("switch"), BALANCED),
    "threshold": (router_of("threshold"), {}),
    "prompt_mlp": (router_of("prompt_mlp"), {}),
    "scenario": (router_of("scenario"), TAUGHT),
    "hard_to_soft": (router_of("hard_to_soft", k=1), TAUGHT),
    "meteora": (router_of("meteora"), TAUGHT),
    "remix": (router_of("remix", k=1), BALANCED),
    "remix, model": (router_of("remix", k=1, per="model"), BALANCED),
}


class Answering(PlainModule):
    """Answers with a mixture, which is told the task where its router goes by it.

    Args:
        mixture: What answers.
        tasks: Names of all tasks.
    """

    def __init__(self, mixture: Mixture, tasks: Mapping[str, Task]) -> None:
        super().__init__(dict.fromkeys(tasks, mixture.base))
        self._mixture = mixture

    def answer(self, batch: Batch) -> list[Any]:
        """Generate."""
        self.model, self._transformer = self._mixture, self._mixture.base
        return super(PlainModule, self).answer(batch) if len(batch) else []

    def options(self, batch: Batch) -> dict[str, Any]:
        """Return the task where the router needs it."""
        router = self._mixture.spec.router
        return {"task": batch.task_names} if router is not None and router.depends_on == "task" else {}


def trained_loras(tasks: Mapping[str, Task], seed: int, out: Path) -> dict[str, Path]:
    """Train one LoRA a task, each by itself, and return their folders."""
    folders = {}
    for name, task in tasks.items():
        folder = out / "loras" / name
        if not (folder / "mixture" / "mixture.json").is_file():
            options = DemoSettings().run_options() | {"seed": seed}
            module = MixtureModule(shared=LoRA(rank=4), **options)
            train_run(name, module, data_of({name: task}, seed, 16), {"seed": seed, "steps": STEPS}, STEPS, folder)
            module.finish().save(folder / "mixture")
        folders[name] = folder / "mixture"
    return folders


def judged(name: str, mixture: Mixture, tasks: Mapping[str, Task], data: MixedTasks, out: Path) -> None:
    """Score a composed mixture on held-out rows."""
    mixture.eval()
    key = {"seed": data.seed, "router": name}
    found = evaluate(Answering(mixture, tasks), data, key, out / slug(name) / "answers.json")
    scores = {task: found["scores"][f"{task}/{data.tasks[task].primary}"] for task in tasks}
    batches = [
        {**batch.inputs, "labels": batch.labels, "task": list(batch.task_names)}
        for batch in data.answered("validation")
    ]
    agreement = {each.task: each.agreement for each in routing_regret(mixture, batches)}
    record = {"name": name, "scores": scores, "mean": statistics.mean(scores.values()), "agreement": agreement}
    write_json(out / slug(name) / "record.json", record)


def fitted(spec: RouterSpec, folders: Mapping[str, Path], data: MixedTasks) -> Mixture:
    """Compose the LoRAs behind a router, and fit it where it takes that."""
    base, _ = load_base(DemoSettings().base, dtype="float32", attn_implementation="eager")
    mixture = moadapt.compose(base, folders, router=spec, frozen=True)
    if spec.fits_from:
        rows = [
            {**batch.inputs, "labels": batch.labels, "task": list(batch.task_names)}
            for batch in islice(data.train_dataloader(), EXAMPLES * 12 // data.batch_size)
        ]
        moadapt.fit_router(mixture, rows)
    return mixture


def taught(name: str, folders: Mapping[str, Path], data: MixedTasks, composed: Path, out: Path) -> Mixture:
    """Train a router on frozen adapters."""
    spec, weights = TRAINED[name]
    module = MixtureModule(
        experts={task: LoRA(rank=4) for task in folders},
        router=spec,
        objectives=[bind(OBJECTIVES.get(each), {"weight": weight}) for each, weight in weights.items()],
        start_from=str(composed),
        train="routers",
        **DemoSettings().run_options() | {"seed": data.seed},
    )
    lightning.seed_everything(data.seed, verbose=False)
    train_run(name, module, data, {"seed": data.seed, "steps": ROUTER_STEPS}, ROUTER_STEPS, out / slug(name))
    return module.mixture


def table(out: Path) -> str:
    """Return the table, in order of the bounds, the fitted and the trained, mean and standard deviation over seeds."""
    found = [json.loads(file.read_text()) | {"seed": file.parts[-3]} for file in out.glob("*/*/record.json")]
    oracle = {record["seed"]: record["mean"] for record in found if record["name"] == "by_task (oracle)"}
    heads = ["router", "right answers", "of the oracle's, %", "agreement with the task, %", "seeds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in (*FITTED, *TRAINED):
        runs = [record for record in found if record["name"] == name]
        if runs:
            cells = [spread([run["mean"] for run in runs], 3)]
            cells.append(spread([100 * run["mean"] / oracle[run["seed"]] for run in runs], 1))
            cells.append(spread([100 * statistics.mean(run["agreement"].values()) for run in runs], 1))
            lines.append(f"| {name} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


def run(names: Sequence[str], tasks: Mapping[str, Task], seed: int, out: Path) -> None:
    """Train what is not yet trained of one seed, and judge routers."""
    folders = trained_loras(tasks, seed, out)
    data, composed = data_of(tasks, seed, 48), out / "composed"
    if not composed.exists():
        fitted(FITTED["by_task (oracle)"], folders, data).save(composed)
    for name in names:
        if not (out / slug(name) / "record.json").is_file():
            if name in TRAINED:
                mixture = taught(name, folders, data, composed, out)
            else:
                mixture = fitted(FITTED[name], folders, data)
            judged(name, mixture, tasks, data, out)


def main() -> None:
    """Run, or print the table."""
    parser = parser_of("Twelve LoRAs trained apart, composed.", [*FITTED, *TRAINED], "runs/composition")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    given = parser.parse_args()
    quiet()
    if given.do == "run":
        torch.set_num_threads(given.threads)
        tasks = twelve()
        for seed in given.seeds:
            run(given.only, tasks, seed, given.out / str(seed))
    print(table(given.out))


if __name__ == "__main__":
    main()
