"""Captioning in the COCO captions format.

One file a split: `{"images": [{id, file_name}], "annotations": [{id, image_id, caption}]}`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from moadapt.registry import TASKS
from moadapt.task import BadExample, Example
from moadapt_tasks.describing import Describing
from moadapt_tasks.patterns import check_splits, check_template, own_words, split_word
from moadapt_tasks.pictures import Pictures
from moadapt_tasks.reading import Table, read_json, read_table
from moadapt_tasks.records import Identifier, Record, collect


@TASKS.register("captioning")
@dataclass(frozen=True, kw_only=True)
class Captioning(Describing):
    """Describes pictures; one row a picture, with all its captions.

    Args:
        captions: Pattern of the captions files, with `{split}`.
        images: Pattern of the pictures, with `{split}` and `{file_name}` or `{image_id}`, such as
            `coco/{split}/{file_name}`.
        splits: The word that stands for each of our splits in the patterns, such as `train: train2014`.
        prompt: What to ask, as it stands.
        max_new_tokens: Longest caption to generate, in tokens.
        more_metrics: Metrics beside CIDEr-D, BLEU and ROUGE-L, by the names of `moadapt list metrics`; `meteor` and
            `spice` need Java.
        limit: Only the first so many usable rows of a split; later ones are not looked at.

    Raises:
        ValueError: A setting is out of range or a pattern mentions something else.
    """

    images: str
    splits: Mapping[str, str] = field(default_factory=own_words)

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check_splits(self.splits)
        check_template("captions", self.captions, ["split"])
        check_template("images", self.images, ["split", "file_name", "image_id"], ["file_name", "image_id"])

    def read(self, split: str) -> tuple[list[Example], list[BadExample]]:
        """Read one split; see `Task.read`."""
        word = split_word(self.splits, split)
        file = Path(self.captions.format(split=word))
        document = read_json(file)
        images = read_table(file, document, "id", "images")
        annotations = read_table(file, document, "id", "annotations")
        captions: dict[Identifier, list[str]] = {}
        _, worse = collect(annotations.rows.values(), partial(_add_caption, images, captions))
        make = partial(self._example, word, captions, Pictures())
        examples, bad = collect(images.rows.values(), make, self.limit)
        return examples, images.bad + annotations.bad + worse + bad

    def _example(
        self, word: str, captions: Mapping[Identifier, list[str]], pictures: Pictures, image: Record
    ) -> Example:
        image_id, name = image.identifier("id"), image.text("file_name")
        if image_id not in captions:
            raise image.wrong("no usable caption describes it; add one or leave the image out")
        return Example(
            pictures=(pictures.find(self.images, image, split=word, image_id=image_id, file_name=name),),
            prompt=self.prompt,
            answers=tuple(captions[image_id]),
            reference=captions[image_id],
            entry=f"{image.file}: {image.entry}",
        )


def _add_caption(images: Table, captions: dict[Identifier, list[str]], annotation: Record) -> None:
    """File a caption under its image."""
    image, caption = images.find("image_id", annotation), annotation.text("caption")
    captions.setdefault(image.identifier("id"), []).append(caption)
