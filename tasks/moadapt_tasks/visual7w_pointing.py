"""Visual question answering by pointing, in the form of Visual7W's pointing questions.

One file for all splits, `{"images": [{image_id, filename, split, qa_pairs: [{qa_id, question, answer,
multiple_choices}]}], "boxes": [{box_id, x, y, width, height}]}`: the answer and the three wrong choices are identifiers
of boxes, left, top, width and height in pixels. Zhu et al. 2016 (arXiv:1511.03416).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from random import Random
from typing import ClassVar, Literal

from torchmetrics import Metric

from moadapt.registry import TASKS
from moadapt.task import BadExample, Example, Task
from moadapt_tasks.boxes import Box, BoxCodec, IntegerBoxes
from moadapt_tasks.marked_splits import check_marks, entries_of
from moadapt_tasks.metrics import ChoiceAccuracy
from moadapt_tasks.metrics.grounding_accuracy import box_iou
from moadapt_tasks.options import LETTERS, check_options, lettered, meant
from moadapt_tasks.patterns import check_numbers, check_template, split_word, template_fields
from moadapt_tasks.pictures import Pictures
from moadapt_tasks.pixel_boxes import box_inside, box_text
from moadapt_tasks.reading import Table, index, read_json, read_table
from moadapt_tasks.records import Record, collect


def _marks() -> dict[str, Sequence[str]]:
    return {"train": ("train",), "validation": ("val",), "test": ("test",)}


@TASKS.register("visual7w_pointing")
@dataclass(frozen=True, kw_only=True)
class Visual7WPointing(Task):
    """Chooses among four boxes that a question may mean, by a box or by a letter.

    A predicted box chooses the one that it overlaps most. Boxes reach out of their pictures in the published file; they
    are cut. The right one stands at a place that depends on the question's identifier alone.

    Args:
        questions: The file of all splits, such as `visual7w/dataset_v7w_pointing.json`.
        images: Pattern of the pictures, with `{filename}` or `{image_id}`, such as `visual7w/images/{filename}`.
        answer: Whether to answer with the `box`, or with the `letter` of one of the prompt's options.
        splits: The words that mark the entries of each of our splits.
        codec: How boxes are written.
        prompt: What to ask, with `{question}`, and `{options}`, a box a line, where letters are asked for.
        max_new_tokens: Longest answer to generate, in tokens.
        limit: Only the first so many usable rows of a split; later ones are not looked at.

    Raises:
        ValueError: A setting is out of range or a pattern mentions something else.
    """

    questions: str
    images: str
    answer: Literal["box", "letter"] = "box"
    splits: Mapping[str, Sequence[str]] = field(default_factory=_marks)
    codec: BoxCodec = field(default_factory=IntegerBoxes)
    prompt: str = "{question}"
    max_new_tokens: int = 32
    limit: int | None = None
    primary: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        """Check the settings."""
        check_marks(self.splits)
        check_numbers(self.max_new_tokens, self.limit)
        check_template("images", self.images, ["filename", "image_id"], ["filename", "image_id"])
        check_template("prompt", self.prompt, ["question", "options"], ["question"])
        if self.answer not in ("box", "letter"):
            raise ValueError(f"`answer` is {self.answer!r}; give box or letter")
        if self.answer == "letter" and "options" not in template_fields(self.prompt):
            raise ValueError(f"`prompt` is {self.prompt!r}; write {{options}} into it, whose letters are the answers")

    def read(self, split: str) -> tuple[list[Example], list[BadExample]]:
        """Read one split; see `Task.read`."""
        file = Path(self.questions)
        document = read_json(file)
        images, bad = entries_of(read_table(file, document, "image_id", "images"), split_word(self.splits, split))
        boxes = read_table(file, document, "box_id", "boxes")
        lists, worse = collect(images, lambda image: image.records("qa_pairs", "qa_id"))
        pairs = index(file, chain.from_iterable(lists), "qa_id")
        examples, worst = collect(pairs.rows.values(), partial(self._example, Pictures(), boxes), self.limit)
        return examples, bad + boxes.bad + worse + pairs.bad + worst

    def parse(self, text: str, example: Example) -> str:
        """Return the letter of the option that the text means."""
        if self.answer == "letter":
            return meant(text, example.reference["options"])
        found = next(iter(self.codec.read(text, example.pictures[0].size) or ()), None)
        overlaps = [0.0 if found is None else box_iou(found, box) for box in example.reference["boxes"]]
        return LETTERS[overlaps.index(max(overlaps))] if any(overlaps) else ""

    def metrics(self) -> dict[str, Metric]:
        """Return the share of right choices."""
        return {"accuracy": ChoiceAccuracy()}

    def _example(self, pictures: Pictures, boxes: Table, pair: Record) -> Example:
        image = pair.within
        assert image is not None
        asked, wrong = pair.text("question"), boxes.find_all("multiple_choices", pair)
        place = Random(str(pair.identifier("qa_id"))).randrange(len(wrong) + 1)
        holders = [*wrong[:place], boxes.find("answer", pair), *wrong[place:]]
        values = {"filename": image.text("filename"), "image_id": image.identifier("image_id")}
        picture = pictures.find(self.images, image, **values)
        choices = [_box(holder, picture.size) for holder in holders]
        held = zip(holders, choices, strict=True)
        options = [box_text(self.codec, [each], picture.size, "", pair) for each in held]
        check_options(options, pair)
        return Example(
            pictures=(picture,),
            prompt=self.prompt.format(question=asked, options=lettered(options)),
            answers=(LETTERS[place] if self.answer == "letter" else options[place],),
            reference={"right": LETTERS[place], "options": options, "boxes": choices},
            entry=f"{pair.file}: {pair.entry}",
        )


def _box(holder: Record, size: tuple[int, int]) -> Box:
    left, top, width, height = (holder.number(key) for key in ("x", "y", "width", "height"))
    if width <= 0 or height <= 0:
        raise holder.wrong(f"it is {width:g} wide and {height:g} high; give a width and a height above 0")
    edges = (left, top, left + width, top + height)
    return box_inside(holder, "box", edges, size, "x, y, width and height", math.inf)
