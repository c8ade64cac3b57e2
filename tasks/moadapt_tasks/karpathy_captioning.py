"""Captioning in the form of Karpathy's splits of COCO, Flickr30k and Flickr8k.

One file for all splits, such as `dataset_coco.json`: `{"images": [{imgid, filename, split, sentences: [{sentid,
raw}]}]}`, for COCO also `filepath`, the folder of the picture. Of COCO, training takes `train` and `restval`, as usual.
Karpathy and Fei-Fei 2015 (arXiv:1412.2306).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from moadapt.registry import TASKS
from moadapt.task import BadExample, Example
from moadapt_tasks.describing import Describing
from moadapt_tasks.marked_splits import check_marks, entries_of
from moadapt_tasks.patterns import check_template, split_word, template_fields
from moadapt_tasks.pictures import Pictures
from moadapt_tasks.reading import read_json, read_table
from moadapt_tasks.records import Record, collect


def _marks() -> dict[str, Sequence[str]]:
    return {"train": ("train", "restval"), "validation": ("val",), "test": ("test",)}


@TASKS.register("karpathy_captioning")
@dataclass(frozen=True, kw_only=True)
class KarpathyCaptioning(Describing):
    """Describes pictures; one row a picture, with all its captions.

    Args:
        captions: The file of all splits, such as `karpathy/dataset_coco.json`.
        images: Pattern of the pictures, with `{filename}` and maybe `{filepath}`, such as `coco/{filepath}/{filename}`
            or `flickr30k-images/{filename}`.
        splits: The words that mark the entries of each of our splits.
        prompt: What to ask, as it stands.
        max_new_tokens: Longest caption to generate, in tokens.
        more_metrics: Metrics beside CIDEr-D, BLEU and ROUGE-L, by the names of `moadapt list metrics`; `meteor` and
            `spice` need Java.
        limit: Only the first so many usable rows of a split; later ones are not looked at.

    Raises:
        ValueError: A setting is out of range or a pattern mentions something else.
    """

    images: str
    splits: Mapping[str, Sequence[str]] = field(default_factory=_marks)

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check_marks(self.splits)
        check_template("images", self.images, ["filepath", "filename"], ["filename"])

    def read(self, split: str) -> tuple[list[Example], list[BadExample]]:
        """Read one split; see `Task.read`."""
        words = split_word(self.splits, split)
        file = Path(self.captions)
        images, bad = entries_of(read_table(file, read_json(file), "imgid", "images"), words)
        unusable: list[BadExample] = []
        examples, worse = collect(images, partial(self._example, Pictures(), unusable), self.limit)
        return examples, bad + unusable + worse

    def _example(self, pictures: Pictures, unusable: list[BadExample], image: Record) -> Example:
        captions, bad = collect(image.records("sentences", "sentid"), lambda sentence: sentence.text("raw"))
        unusable += bad
        if not captions:
            raise image.wrong("none of its sentences is usable; add one or leave the image out")
        values = {name: image.text(name) for name in template_fields(self.images)}
        return Example(
            pictures=(pictures.find(self.images, image, **values),),
            prompt=self.prompt,
            answers=tuple(captions),
            reference=captions,
            entry=f"{image.file}: {image.entry}",
        )
