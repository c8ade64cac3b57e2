"""Visual question answering in the TextVQA format.

One file a split: `{"data": [{question_id, image_id, question, answers: [text]}]}`; ten people answer each question. Its
test split is published without answers. Singh et al. 2019 (arXiv:1904.08920).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moadapt.registry import TASKS
from moadapt.task import BadExample, Example
from moadapt_tasks.human_answers import HumanAnswers
from moadapt_tasks.patterns import split_word
from moadapt_tasks.pictures import Pictures
from moadapt_tasks.reading import read_json, read_table
from moadapt_tasks.records import Record, collect


@TASKS.register("textvqa")
@dataclass(frozen=True, kw_only=True)
class TextVQA(HumanAnswers):
    """Answers questions about the text in pictures.

    Args:
        questions: Pattern of the files, with `{split}`, such as `textvqa/TextVQA_0.5.1_{split}.json`.
        images: Pattern of the pictures, with `{image_id}` and maybe `{split}`, such as
            `textvqa/train_images/{image_id}.jpg`, which holds those of train and val.
        splits: The word that stands for each of our splits in the patterns, such as `validation: val`.
        prompt: What to ask, with `{question}`.
        train_answers: Train on the answer that most people gave, or on all, each time another.
        max_new_tokens: Longest answer to generate, in tokens.
        limit: Only the first so many usable rows of a split; later ones are not looked at.

    Raises:
        ValueError: A setting is out of range or a pattern mentions something else.
    """

    def read(self, split: str) -> tuple[list[Example], list[BadExample]]:
        """Read one split; see `Task.read`."""
        word = split_word(self.splits, split)
        file = Path(self.questions.format(split=word))
        table = read_table(file, read_json(file), "question_id", "data")
        examples, bad = collect(table.rows.values(), partial(self._example, word, Pictures()), self.limit)
        return examples, table.bad + bad

    def _example(self, word: str, pictures: Pictures, question: Record) -> Example:
        answers = question.texts("answers")
        picture = pictures.find(self.images, question, split=word, image_id=question.identifier("image_id"))
        return self.row(question, picture, answers)
