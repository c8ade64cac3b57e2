"""Small files in the published forms, at the paths that the configurations in `configs/jobs` name."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

SIZE = (40, 30)
NUMBERS = {"train2014": (1, 2), "val2014": (3, 4)}
EXPRESSIONS = {"train": "the left cat", "val": "cat {asleep}", "testA": "the black one"}


def write_published(root: Path) -> None:
    """Write VQA v2, Karpathy's splits of COCO, RefCOCO, and rows of text.

    Args:
        root: Where `data` is made.
    """
    for word, numbers in NUMBERS.items():
        (root / "data/coco" / word).mkdir(parents=True)
        for number in numbers:
            Image.effect_noise(SIZE, 50).convert("RGB").save(root / "data/coco" / word / _name(word, number))
        _write(root, f"vqa/v2_OpenEnded_mscoco_{word}_questions.json", {"questions": _questions(numbers)})
        _write(root, f"vqa/v2_mscoco_{word}_annotations.json", {"annotations": _annotations(numbers)})
    _write(root, "karpathy/dataset_coco.json", {"images": _captions(), "dataset": "coco"})
    _write(root, "refcoco/refs.json", _refs())
    _write(root, "refcoco/instances.json", _instances())
    for split in ("train", "validation", "test"):
        _write(root, f"text/{split}.jsonl", [{"question": "two and two?", "answer": ["4", "four"]}])


def _name(word: str, number: int) -> str:
    return f"COCO_{word}_{number:012d}.jpg"


def _write(root: Path, name: str, document: Any) -> None:
    file = root / "data" / name
    file.parent.mkdir(exist_ok=True)
    lines = map(json.dumps, document) if name.endswith(".jsonl") else [json.dumps(document)]
    file.write_text("\n".join(lines), encoding="utf-8")


def _questions(numbers: tuple[int, ...]) -> list[dict[str, Any]]:
    return [{"question_id": 10 * number, "image_id": number, "question": "What is it?"} for number in numbers]


def _annotations(numbers: tuple[int, ...]) -> list[dict[str, Any]]:
    people = [{"answer": "cat", "answer_confidence": "yes", "answer_id": person} for person in range(1, 11)]
    named = {"multiple_choice_answer": "cat", "answers": people}
    return [{"question_id": 10 * number, "image_id": number, **named} for number in numbers]


def _captions() -> list[dict[str, Any]]:
    rows = [("train2014", 1, "train"), ("val2014", 3, "val"), ("val2014", 4, "test")]
    return [
        {
            "imgid": index,
            "filepath": word,
            "filename": _name(word, number),
            "split": split,
            "sentences": [{"sentid": 10 * index + k, "raw": text} for k, text in enumerate(("A cat.", "One cat"))],
        }
        for index, (word, number, split) in enumerate(rows)
    ]


def _refs() -> list[dict[str, Any]]:
    return [
        {
            "ref_id": index,
            "ann_id": 100 + index,
            "image_id": 1,
            "category_id": 1,
            "split": split,
            "file_name": f"COCO_train2014_000000000001_{index}.jpg",
            "sentences": [{"sent_id": index, "sent": text, "raw": text, "tokens": text.split()}],
        }
        for index, (split, text) in enumerate(EXPRESSIONS.items())
    ]


def _instances() -> dict[str, Any]:
    image = {"id": 1, "file_name": _name("train2014", 1), "width": SIZE[0], "height": SIZE[1]}
    boxes = [{"id": 100 + k, "image_id": 1, "category_id": 1, "bbox": [8, 5, 20, 12.5]} for k in range(3)]
    return {"images": [image], "annotations": boxes}
