"""Grounding in REFER's layout (RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO), as JSON.

A refs file `[{ref_id, ann_id, image_id, split, sentences: [{sent_id, sent}]}]` and an instances file in COCO's form,
`{"images": [{id, file_name, width, height}], "annotations": [{id, image_id, bbox}]}` with boxes as left, top, width,
height in pixels. REFER publishes its refs as pickles, which must be rewritten as JSON; the pictures' names are those of
the instances file, since the refs name cut-outs. gRefCOCO's refs hold a list under `ann_id`, which is [-1] beside
`no_target: true` where an expression refers to nothing.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

from torchmetrics import Metric

from moadapt.registry import TASKS
from moadapt.task import BadExample, Example
from moadapt_tasks.boxes import Box
from moadapt_tasks.marked_splits import entries_of
from moadapt_tasks.metrics import BoxSetAccuracy
from moadapt_tasks.patterns import check_template, split_word
from moadapt_tasks.pictures import Pictures
from moadapt_tasks.pixel_boxes import box_from_size, box_text, check_size
from moadapt_tasks.reading import Table, index, read_json, read_table
from moadapt_tasks.records import Record, collect
from moadapt_tasks.referring import Referring


@dataclass(frozen=True)
class _Files:
    """What one split's files say, and the pictures they point to."""

    sentences: Table
    annotations: Table
    images: Table
    pictures: Pictures = field(default_factory=Pictures)


@TASKS.register("grounding")
@dataclass(frozen=True, kw_only=True)
class Grounding(Referring):
    """Finds what an expression refers to; one row a sentence.

    The score `accuracy` is the usual accuracy@0.5: the first box of the answer overlaps the true one by an IoU of at
    least 0.5. With `any_number` it is GREC's `Precision@(F1=1, IoU>=0.5)`, beside its N-acc and T-acc; see
    `BoxSetAccuracy`.

    Args:
        refs: Pattern of the refs files; `{split}` may stand in it. Rows are those whose `split` is the split's word.
        instances: Pattern of the instances files; `{split}` may stand in it.
        images: Pattern of the pictures, with `{file_name}` or `{image_id}` and maybe `{split}`.
        splits: The word that stands for each of our splits in refs and patterns, such as `validation: val`.
        codec: How boxes are written; boxes are cut to what its view shows, while predictions are compared with all of
            the true box.
        any_number: Whether expressions may refer to several boxes or to none, as in gRefCOCO.
        prompt: What to ask, with `{expression}`.
        max_new_tokens: Longest answer to generate, in tokens.
        limit: Only the first so many usable rows of a split; later ones are not looked at.

    Raises:
        ValueError: A setting is out of range or a pattern mentions something else.
    """

    instances: str
    any_number: bool = False
    names_picture: ClassVar[tuple[str, ...]] = ("file_name", "image_id")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check_template("instances", self.instances, ["split"])

    def read(self, split: str) -> tuple[list[Example], list[BadExample]]:
        """Read one split; see `Task.read`."""
        word = split_word(self.splits, split)
        file = Path(self.refs.format(split=word))
        refs, strays = entries_of(read_table(file, read_json(file), "ref_id"), [word])
        files, bad = _open(refs, Path(self.instances.format(split=word)))
        examples, worse = collect(files.sentences.rows.values(), partial(self._example, word, files), self.limit)
        return examples, strays + bad + worse

    def parse(self, text: str, example: Example) -> Box | list[Box] | None:
        """Return the first box of the text in pixels, or all of them with `any_number`; None where nothing is told."""
        return self.codec.read(text, example.pictures[0].size) if self.any_number else super().parse(text, example)

    def metrics(self) -> dict[str, Metric]:
        """Return what judges boxes: one a row, or any number."""
        return {"box": BoxSetAccuracy()} if self.any_number else super().metrics()

    def _example(self, word: str, files: _Files, sentence: Record) -> Example:
        expression, ref = sentence.text("sent"), sentence.within
        assert ref is not None
        annotations = self._annotations(files, ref)
        image = _image(files, ref, annotations)
        values = {"image_id": image.identifier("id"), "file_name": image.text("file_name")}
        picture = files.pictures.find(self.images, image, split=word, **values)
        check_size(image, picture.size, picture.file)
        boxes = [box_from_size(annotation, "bbox", picture.size) for annotation in annotations]
        held = list(zip(annotations, boxes, strict=True))
        return Example(
            pictures=(picture,),
            prompt=self.prompt.format(expression=expression),
            answers=(box_text(self.codec, held, picture.size, expression, sentence),),
            reference=boxes if self.any_number else boxes[0],
            entry=f"{sentence.file}: {sentence.entry}",
        )

    def _annotations(self, files: _Files, ref: Record) -> list[Record]:
        """Return what a ref points to."""
        nothing = ref.values.get("no_target") is True
        if nothing and ref.values.get("ann_id") in (None, -1, [-1]):
            found = []
        else:
            found = files.annotations.find_all("ann_id", ref)
        if nothing and found:
            raise ref.wrong("it has no_target and points to annotations in ann_id; leave out one of the two")
        if len(found) != 1 and not self.any_number:
            raise ref.wrong(f"it refers to {len(found)} boxes; set any_number: true where that is meant")
        return found


def _open(refs: list[Record], instances: Path) -> tuple[_Files, list[BadExample]]:
    lists, bad = collect(refs, lambda ref: ref.records("sentences", "sent_id"))
    sentences = index(refs[0].file, (sentence for found in lists for sentence in found), "sent_id")
    document = read_json(instances)
    annotations = read_table(instances, document, "id", "annotations")
    images = read_table(instances, document, "id", "images")
    return _Files(sentences, annotations, images), bad + sentences.bad + annotations.bad + images.bad


def _image(files: _Files, ref: Record, annotations: list[Record]) -> Record:
    """Return the image of a ref, which is that of its annotations."""
    for annotation in annotations:
        image = files.images.find("image_id", annotation)
        if ref.identifier("image_id") != image.identifier("id"):
            raise ref.wrong(
                f"its image_id is not {image.identifier('id')!r}, that of its annotation in {annotation.file}"
            )
    return files.images.find("image_id", ref)
