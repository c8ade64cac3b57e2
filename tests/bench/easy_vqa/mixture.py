"""Three tasks on one mixture: what is trained on the easy-VQA base, and how it is scored.

One LoRA a task and a shared one, behind a softmax router that is not told the task. Scores are those of held-out
images. Questions are asked once more with the pictures shuffled among them: what is still answered takes no looking.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torchmetrics import Metric

from moadapt.adapters import LoRA
from moadapt.demo.evaluation import evaluate
from moadapt.demo.training import train_run, write_json
from moadapt.registry import ROUTERS
from moadapt.sampling import Temperature
from moadapt.specs import bind
from moadapt.task import BadExample, Example, Task
from moadapt.training import MixedTasks, MixtureModule, Optimization
from moadapt_tasks.metrics.exact_match import ExactMatch
from tests.bench.easy_vqa.files import tasks

STEPS, RANK, SHARED_RANK = 1500, 16, 8


@dataclass(frozen=True, kw_only=True)
class Shuffled(Task):
    """The rows of a task, each with the pictures of another one.

    Args:
        of: The task.
        seed: Of the order.
    """

    of: Task
    seed: int = 0
    primary: ClassVar[str] = "accuracy"

    @property
    def max_new_tokens(self) -> int:  # type: ignore[override]
        """Longest answer to generate."""
        return self.of.max_new_tokens

    def read(self, split: str) -> tuple[list[Example], list[BadExample]]:
        """Read the rows and shuffle their pictures."""
        rows, bad = self.of.read(split)
        order = np.random.default_rng(self.seed).permutation(len(rows))
        return [replace(row, pictures=rows[i].pictures) for row, i in zip(rows, order, strict=True)], bad

    def parse(self, text: str, example: Example) -> Any:
        """Parse as the task does."""
        return self.of.parse(text, example)

    def metrics(self) -> dict[str, Metric]:
        """Score as the task does."""
        return self.of.metrics()


def rows_of(base: Path, given: dict[str, Task], seed: int) -> MixedTasks:
    """Return the rows of some tasks, larger ones more often, but less so than they are larger.

    Args:
        base: Folder of the base.
        given: Tasks by name.
        seed: Of their order.
    """
    data = MixedTasks(str(base), given, None, batch_size=32, eval_batch_size=128, sampling=Temperature(), seed=seed)
    data.setup("fit")
    data.setup("predict")
    return data


def mixture_module(base: Path, seed: int) -> MixtureModule:
    """Return what is trained.

    Args:
        base: Folder of the base.
        seed: Of adapters and router.
    """
    return MixtureModule(
        base=str(base),
        experts={name: LoRA(rank=RANK) for name in ("vqa", "captioning", "grounding")},
        shared=LoRA(rank=SHARED_RANK),
        router=bind(ROUTERS.get("softmax"), {}),
        dtype="float32",
        attn_implementation="eager",  # the fastest on a CPU at these lengths
        optimization=Optimization(learning_rate=3e-3, router_learning_rate=3e-3, warmup=0.05),
        seed=seed,
    )


def question_alone(train: Sequence[Example], test: Sequence[Example]) -> float:
    """Return the share of rows that the commonest answer to the same question is right for.

    Args:
        train: Rows that tell the commonest answer.
        test: Rows to answer.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        answers[row.prompt].update(row.answers)
    return statistics.mean(answers[row.prompt].most_common(1)[0][0] in row.answers for row in test)


def fit(source: Path, folder: Path, base: Path, seed: int, out: Path, steps: int = STEPS) -> dict[str, Any]:
    """Train and score one mixture, or load what is known of it.

    Args:
        source: The authors' folder.
        folder: The prepared files.
        base: Folder of the base.
        seed: Of order, adapters and router.
        out: Folder of the run.
        steps: How many.

    Returns:
        Its record: `scores`, `parameters`, `seconds`.
    """
    given, key = tasks(source, folder), {"seed": seed, "steps": steps}
    data, module = rows_of(base, given, seed), mixture_module(base, seed)
    trained = train_run("mixture", module, data, key, steps, out)
    count = sum(p.numel() for p in module.finish().parameters() if p.requires_grad)
    found = evaluate(module, data, key, out / "answers.json")
    shuffled = rows_of(base, {"vqa": Shuffled(of=given["vqa"], seed=seed)}, seed)
    blind = evaluate(module, shuffled, key, out / "shuffled.json")
    exact = ExactMatch(spelling="as_is")
    captions = [row for row in found["answers"] if row["task"] == "captioning"]
    exact.update([row["prediction"] for row in captions], [row["reference"] for row in captions])
    scores = found["scores"] | {
        "vqa/accuracy, pictures shuffled": blind["scores"]["vqa/accuracy"],
        "vqa/accuracy, question alone": question_alone(shuffled.examples("train"), shuffled.examples("test")),
        "captioning/exact_match": float(exact.compute()),
    }
    record = {**key, "parameters": count, "seconds": trained["seconds"], "scores": scores}
    write_json(out / "record.json", record)
    return record
