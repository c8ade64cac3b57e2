"""easy-VQA in the public forms that moadapt's tasks read: VQA v2, COCO captions and RefCOCO.

The authors' folder `data/train` (github.com/vzhou842/easy-VQA) holds `images/<image_id>.png`, a shape on a plain ground
each, and `questions.json` with lists of question, answer and image id. Captions and boxes are not theirs: colour and
shape are what their answers tell, for some images one of them or none, and boxes are where pixels are clearly not the
ground's. Every fifth image is held out as `test`.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moadapt.demo.training import write_json
from moadapt.picture import Picture
from moadapt.task import Task
from moadapt_tasks.captioning import Captioning
from moadapt_tasks.grounding import Grounding
from moadapt_tasks.vqa import VQA

SIDE = 64
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
FAINT = 30  # how far three colour channels of 0 to 255 may be from the ground's in all; edges fade into it
SMALL = 22  # pixels; a shape whose longer side is below it is small
_WORDS = {"train": "train", "validation": "test", "test": "test"}  # nothing is chosen by validation
Facts = Mapping[str, Any]


def split_of(image_id: int) -> str:
    """Return the split of an image."""
    return "test" if image_id % 5 == 0 else "train"


def read_facts(folder: Path, split: str) -> dict[int, Facts]:
    """Return `color`, `shape` (None where untold) and `box` of a split's images, by image id.

    Args:
        folder: What `prepare` wrote.
        split: `train` or `test`.
    """
    found = json.loads((folder / "facts.json").read_text())
    return {int(key): facts for key, facts in found.items() if split_of(int(key)) == split}


def picture_of(source: Path, image_id: int) -> NDArray[np.uint8]:
    """Return the pixels of an image, (64, 64, 3).

    Args:
        source: The authors' folder.
        image_id: Its number.
    """
    return np.asarray(Picture(source / "images" / f"{image_id}.png", (SIDE, SIDE)).open())


def prepare(source: Path, out: Path) -> None:
    """Write the files of the three tasks, once.

    Args:
        source: The authors' folder.
        out: Where to.
    """
    if (out / "facts.json").is_file():
        return
    questions = json.loads((source / "questions.json").read_text())
    told = told_by(questions)
    keys = sorted(int(file.stem) for file in (source / "images").glob("*.png"))
    facts = {key: {"color": None, "shape": None, **told[key], "box": box_of(picture_of(source, key))} for key in keys}
    for split in ("train", "test"):
        asked = [(i, *row) for i, row in enumerate(questions) if split_of(row[2]) == split]
        _write_questions(asked, split, out)
        whole = {k: f for k, f in facts.items() if split_of(k) == split and f["color"] and f["shape"]}
        _write_captions(whole, split, out)
        _write_expressions(whole, split, out)
    write_json(out / "facts.json", facts)


def told_by(questions: Iterable[tuple[str, str, int]]) -> dict[int, dict[str, str]]:
    """Return `color` and `shape` of each image where an answer is one, or says yes to one.

    Args:
        questions: Question, answer and image id.
    """
    found: dict[int, dict[str, str]] = defaultdict(dict)
    for question, answer, image_id in questions:
        words = question.rstrip("?").split()
        plain = answer == "yes" and "not" not in words and "no" not in words
        for word in (answer, *(words if plain else ())):
            if word in COLORS or word in SHAPES:
                found[image_id]["color" if word in COLORS else "shape"] = word
    return found


def box_of(pixels: NDArray[np.uint8]) -> list[int]:
    """Return left, top, right, bottom of what is clearly not of the commonest colour.

    Args:
        pixels: Of an image, (64, 64, 3).
    """
    colors, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    apart = np.abs(pixels.astype(int) - colors[counts.argmax()]).sum(axis=-1)
    rows, columns = np.nonzero(apart > FAINT)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def tasks(source: Path, folder: Path) -> dict[str, Task]:
    """Return the three tasks, each as a YAML would name it.

    Args:
        source: The authors' folder.
        folder: What `prepare` wrote.
    """
    named, numbered = f"{source}/images/{{file_name}}", f"{source}/images/{{image_id}}.png"
    return {
        "vqa": VQA(
            questions=f"{folder}/questions_{{split}}.json",
            annotations=f"{folder}/annotations_{{split}}.json",
            images=numbered,
            splits=_WORDS,
            max_new_tokens=6,
        ),
        "captioning": Captioning(
            captions=f"{folder}/captions_{{split}}.json", images=named, splits=_WORDS, max_new_tokens=12
        ),
        "grounding": Grounding(
            refs=f"{folder}/refs_{{split}}.json",
            instances=f"{folder}/instances_{{split}}.json",
            images=named,
            splits=_WORDS,
            max_new_tokens=16,
        ),
    }


def caption_of(facts: Facts) -> str:
    """Return what is to be said of an image, such as `a small red circle`."""
    left, top, right, bottom = facts["box"]
    size = "small" if max(right - left, bottom - top) < SMALL else "big"
    return f"a {size} {facts['color']} {facts['shape']}"


def _write_questions(asked: Iterable[tuple[int, str, str, int]], split: str, out: Path) -> None:
    questions, annotations = [], []
    for number, question, answer, image_id in asked:
        key = {"question_id": number, "image_id": image_id}
        questions.append(key | {"question": question})
        annotations.append(key | {"multiple_choice_answer": answer, "answers": [{"answer": answer}] * 10})
    write_json(out / f"questions_{split}.json", {"questions": questions})
    write_json(out / f"annotations_{split}.json", {"annotations": annotations})


def _write_captions(told: Mapping[int, Facts], split: str, out: Path) -> None:
    annotations = [{"id": key, "image_id": key, "caption": caption_of(facts)} for key, facts in told.items()]
    write_json(out / f"captions_{split}.json", {"images": _images(told), "annotations": annotations})


def _write_expressions(told: Mapping[int, Facts], split: str, out: Path) -> None:
    refs, annotations = [], []
    for key, facts in told.items():
        left, top, right, bottom = facts["box"]
        annotations.append({"id": key, "image_id": key, "bbox": [left, top, right - left, bottom - top]})
        sentence = {"sent_id": key, "sent": f"the {facts['color']} {facts['shape']}"}
        refs.append({"ref_id": key, "ann_id": key, "image_id": key, "split": split, "sentences": [sentence]})
    write_json(out / f"refs_{split}.json", refs)
    write_json(out / f"instances_{split}.json", {"images": _images(told), "annotations": annotations})


def _images(told: Iterable[int]) -> list[dict[str, Any]]:
    return [{"id": key, "file_name": f"{key}.png", "width": SIDE, "height": SIDE} for key in told]
