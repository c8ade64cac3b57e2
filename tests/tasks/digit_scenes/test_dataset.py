from pathlib import Path
from typing import Any

import pytest

from moadapt.registry import DATASETS
from moadapt.task import SPLITS, Task
from moadapt_tasks.captioning import Captioning
from moadapt_tasks.digit_scenes.dataset import DigitScenes
from moadapt_tasks.grounding import Grounding
from moadapt_tasks.vqa import VQA


def small(root: Path, **changes: Any) -> DigitScenes:
    numbers = {"train": 12, "validation": 5, "test": 7, "questions": 3, "expressions": 2}
    return DigitScenes(root=str(root), **numbers | changes)


def scores_of_right_answers(task: Task, split: str) -> dict[str, float]:
    examples, _ = task.read(split)
    scores: dict[str, float] = {}
    for name, metric in task.metrics().items():
        predictions = [task.parse(example.answers[0], example) for example in examples]
        metric.update(predictions, [example.reference for example in examples])
        value = metric.compute()
        scores |= {k: v.item() for k, v in value.items()} if isinstance(value, dict) else {name: value.item()}
    return scores


def test_digit_scenes_is_registered() -> None:
    assert DATASETS.get("digit_scenes") is DigitScenes


def test_prepare_returns_tasks_that_read_every_split_without_complaint(tmp_path: Path) -> None:
    tasks = small(tmp_path / "{odd} name").prepare()
    assert {name: type(task) for name, task in tasks.items()} == {
        "vqa": VQA,
        "captioning": Captioning,
        "grounding": Grounding,
    }
    for name, rows in (("vqa", 3), ("captioning", 1), ("grounding", 2)):
        for split, scenes in zip(SPLITS, (12, 5, 7), strict=True):
            examples, bad = tasks[name].read(split)
            assert (len(examples), bad) == (rows * scenes, [])
            assert {example.pictures[0].size for example in examples} == {(56, 56)}
            assert all(example.pictures[0].file.is_file() for example in examples)


def test_right_answers_score_the_most_there_is(tmp_path: Path) -> None:
    tasks = small(tmp_path).prepare()
    assert scores_of_right_answers(tasks["vqa"], "test") == {"accuracy": 1}
    grounding = scores_of_right_answers(tasks["grounding"], "test")
    assert grounding["accuracy"] == 1
    assert grounding["mean_iou"] > 0.97  # boxes are rounded to a 999th of the side
    captioning = scores_of_right_answers(tasks["captioning"], "test")
    assert captioning["rouge_l"] == pytest.approx(1)
    assert captioning["bleu_4"] == pytest.approx(1)


def test_primary_is_among_the_scores(tmp_path: Path) -> None:
    for task in small(tmp_path).prepare().values():
        assert task.primary in scores_of_right_answers(task, "validation")


def test_prepare_rewrites_only_what_changed(tmp_path: Path) -> None:
    small(tmp_path).prepare()
    before = {split: (tmp_path / split).stat().st_ino for split in SPLITS}
    small(tmp_path).prepare()
    assert {split: (tmp_path / split).stat().st_ino for split in SPLITS} == before
    small(tmp_path, test=8).prepare()
    after = {split: (tmp_path / split).stat().st_ino for split in SPLITS}
    assert {split for split in SPLITS if after[split] != before[split]} == {"test"}


@pytest.mark.parametrize("change", [{"train": 0}, {"test": -1}, {"questions": 0}, {"expressions": 0}, {"seed": -1}])
def test_digit_scenes_refuses_a_number_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(change))}` is {next(iter(change.values()))}; give at least"):
        DigitScenes(**change)
