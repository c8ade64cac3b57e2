"""Bases with a classification head train and are scored through the same data module and training module."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torchmetrics import Metric
from transformers import AutoConfig

from moadapt.adapters import LoRA
from moadapt.answer_losses import answer_losses
from moadapt.bases import class_names
from moadapt.picture import Picture
from moadapt.placement import Placement
from moadapt.ranks import ExplainedVariance
from moadapt.task import BadExample, Example, Task
from moadapt.training import MixedTasks, MixtureModule, Optimization
from moadapt.training.classes import ClassCollator
from moadapt.training.collate import Item
from moadapt_routers import ByTask, Softmax
from moadapt_tasks.metrics import ExactMatch
from tests.bases.twins import twin
from tests.training import toy
from tests.training.runs import trainer

CLASSES = ("red", "green", "blue")
EVERYWHERE = Placement(towers=("vision", "language"))


@dataclass(frozen=True, kw_only=True)
class Words(Task):
    """Tells which colour a text names; `turned` wants the next one."""

    turned: int = 0
    answers: Sequence[str] = CLASSES
    primary: ClassVar[str] = "accuracy"
    max_new_tokens: int = 1

    def read(self, split: str) -> tuple[list[Example], list[BadExample]]:
        rows = []
        for row in range(12):
            answer = self.answers[(row + self.turned) % 3]
            prompt = f"{'next to ' * self.turned}{CLASSES[row % 3]}{' it is' * (row // 3)}"
            rows.append(Example((), prompt, (answer,), [answer], f"words: row {row}"))
        return rows, []

    def parse(self, text: str, example: Example) -> str:
        return text

    def metrics(self) -> dict[str, Metric]:
        return {"accuracy": ExactMatch("as_is")}


def write(name: str, folder: Path, **settings: Any) -> str:
    """Write a twin whose head knows three classes."""
    made = twin(name)
    config = made.model.config
    config.id2label = dict(enumerate(CLASSES))
    config.label2id = {label: index for index, label in config.id2label.items()}
    for key, value in settings.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = type(made.model)(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    made.processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["bert", "vit", "dinov2"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, MixedTasks]:
    base = write(request.param, tmp_path / "base")
    if request.param == "bert":
        tasks: dict[str, Task] = {"small": Words(), "large": Words(turned=1)}
    else:
        tasks = {"small": toy.Colour(root=str(tmp_path / "a")), "large": toy.Colour(root=str(tmp_path / "b"), rows=9)}
    return base, MixedTasks(base, tasks, batch_size=6)


def module_on(base: str, router: Any = None, **options: Any) -> MixtureModule:
    torch.manual_seed(0)
    settings = Optimization(learning_rate=3e-2, router_learning_rate=1e-2, schedule="constant")
    experts = {"small": LoRA(rank=4), "large": LoRA(rank=4)}
    module = MixtureModule(
        base, experts, LoRA(rank=2), router or ByTask(), EVERYWHERE, optimization=settings, **options
    )
    module.configure_model()
    return module


def test_the_loss_is_the_cross_entropy_of_the_class(made: tuple[str, MixedTasks]) -> None:
    base, data = made
    data.setup("fit")
    module = module_on(base)
    (batch,) = data.first_batches(1)
    assert [batch.classes[index] for index in batch.labels[:, 0]] == [each.answers[0] for each in batch.examples]
    module.mixture.eval()
    rows = {**batch.inputs, "task": list(batch.task_names)}
    with torch.no_grad():
        chances = module.mixture(**rows).logits.log_softmax(-1)
        expected = [-float(row[index]) for row, index in zip(chances, batch.labels[:, 0].tolist(), strict=True)]
        for losses, counts in (
            module.losses(batch),
            answer_losses(module.mixture, {**rows, "labels": batch.labels}),
        ):
            assert losses.tolist() == pytest.approx(expected, rel=1e-5)
            assert counts.tolist() == [1] * len(batch)


@pytest.mark.parametrize("router", [ByTask(), Softmax()])
def test_a_base_that_classifies_trains_and_is_scored(router: Any, made: tuple[str, MixedTasks], tmp_path: Path) -> None:
    base, data = made
    module = module_on(base, router)
    fit = trainer(tmp_path, max_steps=40)
    fit.fit(module, datamodule=data)
    (scores,) = fit.test(module, datamodule=data, verbose=False)
    predicted = [row for rows in fit.predict(module, datamodule=data) for row in rows]
    for name, task in data.tasks.items():
        own = [row for row in predicted if row["task"] == name]
        assert {row["text"] for row in own} <= set(CLASSES)
        right = [row["prediction"] in row["reference"] for row in own]
        assert scores[f"{name}/{task.primary}"] == pytest.approx(sum(right) / len(right))
        assert sum(right) / len(right) > 0.8  # a constant answer gives a third


def test_starts_that_read_data_take_such_batches(made: tuple[str, MixedTasks], tmp_path: Path) -> None:
    base, data = made
    module = module_on(base, ranks=ExplainedVariance())
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, datamodule=data)
    assert all(bool(p.isfinite().all()) for _, p in module.mixture.named_adapter_parameters())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Example((), "green", ("grass",), ["grass"], "file: row 3"), "file: row 3: its answer 'grass' is no class"),
        (Example((Picture(Path("a.png"), (2, 2)),), "green", ("red",), ["red"], "file: row 4"), "row 4: has 1 pict"),
    ],
)
def test_rows_that_do_not_fit_are_named(row: Example, message: str) -> None:
    collator = ClassCollator(twin("bert").processor, CLASSES, answers=True)
    with pytest.raises(ValueError, match=message):
        collator([Item("words", row, 0)])


def test_a_picture_is_needed_where_pictures_are_classified() -> None:
    collator = ClassCollator(twin("vit").processor, CLASSES, answers=True)
    with pytest.raises(ValueError, match="row 5: has 0 pictures, and this base classifies pictures, so give one"):
        collator([Item("words", Example((), "green", ("red",), ["red"], "file: row 5"), 0)])


def test_texts_are_cut_to_what_the_base_reads() -> None:
    tokenizer = twin("bert").processor
    tokenizer.model_max_length = 10
    collator = ClassCollator(tokenizer, CLASSES, answers=False)
    batch = collator([Item("words", Example((), "green" * 9, ("red",), ["red"], "file: row 0"), 0)])
    assert batch.inputs["input_ids"].shape == (1, 10)
    assert batch.labels is None


@pytest.mark.parametrize(
    "settings", [{"problem_type": "multi_label_classification"}, {"problem_type": "regression"}, {"num_labels": 1}]
)
def test_heads_of_another_kind_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write("bert", tmp_path, **settings))
    with pytest.raises(ValueError, match="tells one of several classes a row"):
        class_names(config)


def test_bases_that_write_have_no_classes(tmp_path: Path) -> None:
    twin("llama").model.save_pretrained(tmp_path)
    assert class_names(AutoConfig.from_pretrained(tmp_path)) is None


def test_there_is_no_text_of_a_base_that_classifies(made: tuple[str, MixedTasks]) -> None:
    with pytest.raises(ValueError, match="classifies"):
        made[1].tokenizer  # noqa: B018
