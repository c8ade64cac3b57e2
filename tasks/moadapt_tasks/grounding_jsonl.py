"""Grounding in the JSON lines that Qwen-VL's and InternVL's evaluations share (RefCOCO, RefCOCO+, RefCOCOg).

An expression a line, `{image, sent, bbox: [left, top, right, bottom], width, height}`, boxes in pixels; one file a
split. Shikra's files have the same form with `img_path` and `expression`.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from moadapt.registry import TASKS
from moadapt.task import BadExample, Example
from moadapt_tasks.json_rows import read_rows
from moadapt_tasks.patterns import split_word
from moadapt_tasks.pictures import Pictures
from moadapt_tasks.pixel_boxes import box_from_corners, box_text, check_size
from moadapt_tasks.records import Record, collect
from moadapt_tasks.referring import Referring


@TASKS.register("grounding_jsonl")
@dataclass(frozen=True, kw_only=True)
class GroundingJSONLines(Referring):
    """Finds what an expression refers to; one row a line.

    Args:
        refs: Pattern of the files, with `{split}`, such as `refcoco/refcoco_{split}.jsonl`.
        images: Pattern of the pictures, with `{image}`, the path as the file has it, or `{file_name}`, its last part,
            and maybe `{split}`, such as `coco/train2014/{file_name}`.
        image_field: The field of the picture's path.
        expression_field: The field of the expression.
        splits: The word that stands for each of our splits in the patterns, such as `test: testA`.
        codec: How boxes are written; boxes are cut to what its view shows, while predictions are compared with all of
            the true box.
        prompt: What to ask, with `{expression}`.
        max_new_tokens: Longest answer to generate, in tokens.
        limit: Only the first so many usable rows of a split; later ones are not looked at.

    Raises:
        ValueError: A setting is out of range or a pattern mentions something else.
    """

    image_field: str = "image"
    expression_field: str = "sent"
    names_picture: ClassVar[tuple[str, ...]] = ("image", "file_name")

    def read(self, split: str) -> tuple[list[Example], list[BadExample]]:
        """Read one split; see `Task.read`."""
        word = split_word(self.splits, split)
        rows, unreadable = read_rows(Path(self.refs.format(split=word)))
        examples, bad = collect(rows, partial(self._example, word, Pictures()), self.limit)
        return examples, unreadable + bad

    def _example(self, word: str, pictures: Pictures, row: Record) -> Example:
        expression, image = row.text(self.expression_field), row.text(self.image_field)
        picture = pictures.find(self.images, row, split=word, image=image, file_name=Path(image).name)
        check_size(row, picture.size, picture.file)
        box = box_from_corners(row, "bbox", picture.size)
        return Example(
            pictures=(picture,),
            prompt=self.prompt.format(expression=expression),
            answers=(box_text(self.codec, [(row, box)], picture.size, expression, row),),
            reference=box,
            entry=f"{row.file}: {row.entry}",
        )
