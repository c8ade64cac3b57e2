"""Visual question answering in the VQA v2 format.

A questions file `{"questions": [{question_id, image_id, question}]}` and an annotations file `{"annotations":
[{question_id, image_id, answers: [{answer}], multiple_choice_answer}]}` a split; ten people answer each question.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moadapt.registry import TASKS
from moadapt.task import BadExample, Example
from moadapt_tasks.human_answers import HumanAnswers
from moadapt_tasks.patterns import check_template, split_word
from moadapt_tasks.pictures import Pictures
from moadapt_tasks.reading import Table, read_json, read_table
from moadapt_tasks.records import Record, collect


@TASKS.register("vqa")
@dataclass(frozen=True, kw_only=True)
class VQA(HumanAnswers):
    """Answers questions about pictures.

    Args:
        questions: Pattern of the questions files, with `{split}`.
        annotations: Pattern of the annotations files, with `{split}`.
        images: Pattern of the pictures, with `{split}` and `{image_id}`, such as
            `coco/{split}/COCO_{split}_{image_id:012d}.jpg`.
        splits: The word that stands for each of our splits in the patterns, such as `train: train2014`.
        prompt: What to ask, with `{question}`.
        train_answers: Train on the answer that most people gave, or on all, each time another.
        max_new_tokens: Longest answer to generate, in tokens.
        limit: Only the first so many usable rows of a split; later ones are not looked at.

    Raises:
        ValueError: A setting is out of range or a pattern mentions something else.
    """

    annotations: str
    max_new_tokens: int = 12

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check_template("annotations", self.annotations, ["split"])

    def read(self, split: str) -> tuple[list[Example], list[BadExample]]:
        """Read one split; see `Task.read`."""
        word = split_word(self.splits, split)
        questions = _table(self.questions.format(split=word), "questions")
        annotations = _table(self.annotations.format(split=word), "annotations")
        _, strays = collect(annotations.rows.values(), partial(questions.find, "question_id"))
        make = partial(self._example, word, annotations, Pictures())
        examples, bad = collect(questions.rows.values(), make, self.limit)
        return examples, questions.bad + annotations.bad + strays + bad

    def _example(self, word: str, annotations: Table, pictures: Pictures, question: Record) -> Example:
        image_id = question.identifier("image_id")
        annotation = annotations.find("question_id", question)
        if "image_id" in annotation and annotation.identifier("image_id") != image_id:
            raise annotation.wrong(f"its image_id is not {image_id!r}, that of its question in {question.file}")
        answers = annotation.texts("answers", "answer")
        named = annotation.text("multiple_choice_answer") if "multiple_choice_answer" in annotation else None
        picture = pictures.find(self.images, question, split=word, image_id=image_id)
        return self.row(question, picture, answers, named)


def _table(file: str, under: str) -> Table:
    return read_table(Path(file), read_json(Path(file)), "question_id", under)
