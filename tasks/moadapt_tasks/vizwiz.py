"""Visual question answering in the VizWiz format.

One file a split: `[{image, question, answers: [{answer, answer_confidence}], answer_type, answerable}]`, each picture
with its one question; ten people answer each. The test split is published without answers. Gurari et al. 2018
(arXiv:1802.08218).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from moadapt.registry import TASKS
from moadapt.task import BadExample, Example
from moadapt_tasks.human_answers import HumanAnswers
from moadapt_tasks.patterns import split_word
from moadapt_tasks.pictures import Pictures
from moadapt_tasks.reading import read_json, read_table
from moadapt_tasks.records import Record, collect


@TASKS.register("vizwiz")
@dataclass(frozen=True, kw_only=True)
class VizWiz(HumanAnswers):
    """Answers questions of blind people about what they photographed, or says that they are unanswerable.

    Args:
        questions: Pattern of the files, with `{split}`, such as `vizwiz/Annotations/{split}.json`.
        images: Pattern of the pictures, with `{image}` and maybe `{split}`, such as `vizwiz/{split}/{image}`.
        splits: The word that stands for each of our splits in the patterns, such as `validation: val`.
        prompt: What to ask, with `{question}`.
        train_answers: Train on the answer that most people gave, or on all, each time another.
        max_new_tokens: Longest answer to generate, in tokens.
        limit: Only the first so many usable rows of a split; later ones are not looked at.

    Raises:
        ValueError: A setting is out of range or a pattern mentions something else.
    """

    names_picture: ClassVar[str] = "image"

    def read(self, split: str) -> tuple[list[Example], list[BadExample]]:
        """Read one split; see `Task.read`."""
        word = split_word(self.splits, split)
        file = Path(self.questions.format(split=word))
        table = read_table(file, read_json(file), "image")
        examples, bad = collect(table.rows.values(), partial(self._example, word, Pictures()), self.limit)
        return examples, table.bad + bad

    def _example(self, word: str, pictures: Pictures, question: Record) -> Example:
        answers = question.texts("answers", "answer")
        picture = pictures.find(self.images, question, split=word, image=question.text("image"))
        return self.row(question, picture, answers)
