"""Digit scenes on disk, in the public formats.

A split is a folder: `images/*.png`, `questions.json` and `annotations.json` (VQA v2), `captions.json` (COCO),
`refs.json` and `instances.json` (REFER), and `manifest.json`, which says what made it. It is written aside and renamed,
so a folder that is there is whole.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from moadapt_tasks.digit_scenes.answers import ten_answers
from moadapt_tasks.digit_scenes.captions import captions
from moadapt_tasks.digit_scenes.expressions import refer
from moadapt_tasks.digit_scenes.questions import Question, ask
from moadapt_tasks.digit_scenes.scenes import SIZE, Scene, SceneObject, draw_scene

Entry = dict[str, Any]
Rng = np.random.Generator

_WRITER = "moadapt digit scenes"
_VERSION = 2
"""To be raised whenever the same settings would give other files."""
_FIRST_SEED = 1000
"""Seeds below belong to pre-training."""


@dataclass(frozen=True)
class SplitSettings:
    """What makes a split.

    Args:
        split: Whose handwriting to use: `train`, `validation` or `test`.
        scenes: How many scenes, at least 1.
        questions: Questions a scene, at least 1; a scene may bear fewer.
        expressions: Referring expressions a scene, at least 1; a scene may bear fewer.
        seed: Another seed is another data set, from 0.
    """

    split: str
    scenes: int
    questions: int
    expressions: int
    seed: int


def write_split(folder: Path, settings: SplitSettings) -> bool:
    """Write a split, unless the folder holds it already.

    Args:
        folder: Where to write; files of other settings there are replaced.
        settings: What to write.

    Returns:
        Whether anything was written.

    Raises:
        ValueError: The folder holds something that was not written here.
    """
    manifest: Entry = {"writer": _WRITER, "version": _VERSION, **asdict(settings)}
    if _manifest_in(folder) == manifest:
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
        fresh = Path(aside, "fresh")
        _fill(fresh, settings)
        _write(fresh / "manifest.json", manifest)
        if folder.exists():
            folder.rename(Path(aside, "old"))
        fresh.rename(folder)
    return True


def _manifest_in(folder: Path) -> Entry | None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if not isinstance(manifest, dict) or manifest.get("writer") != _WRITER:
        raise ValueError(f"{folder} holds files that are no digit scenes; choose another root or empty the folder")
    return manifest


def _fill(folder: Path, settings: SplitSettings) -> None:
    scenes = [draw_scene(settings.split, index, _FIRST_SEED + settings.seed) for index in range(settings.scenes)]
    (folder / "images").mkdir(parents=True)
    for image_id, scene in enumerate(scenes):
        Image.fromarray(scene.pixels).save(folder / "images" / file_name(image_id), compress_level=1)
    images = [{"id": i, "file_name": file_name(i), "width": SIZE, "height": SIZE} for i in range(len(scenes))]
    questions, annotations = _questions(scenes, settings)
    _write(folder / "questions.json", {"questions": questions})
    _write(folder / "annotations.json", {"annotations": annotations})
    _write(folder / "captions.json", {"images": images, "annotations": _captions(scenes)})
    _write(folder / "refs.json", _refs(scenes, settings))
    categories = [{"id": digit, "name": str(digit)} for digit in range(10)]
    instances = {"images": images, "annotations": _instances(scenes), "categories": categories}
    _write(folder / "instances.json", instances)


def file_name(image_id: int) -> str:
    """Return the name of a scene's picture."""
    return f"{image_id:06d}.png"


def _questions(scenes: Sequence[Scene], settings: SplitSettings) -> tuple[list[Entry], list[Entry]]:
    questions, annotations = [], []
    for image_id, scene in enumerate(scenes):
        rng = _rng(settings, image_id, "questions")
        for number, question in enumerate(ask(scene, settings.questions, rng)):
            ids = {"image_id": image_id, "question_id": image_id * 1000 + number}
            questions.append({**ids, "question": question.text})
            annotations.append({**ids, **_annotation(question, rng)})
    return questions, annotations


def _annotation(question: Question, rng: Rng) -> Entry:
    answers = enumerate(ten_answers(question.answer, rng), start=1)
    kinds = {"existence": "yes/no", "count": "number", "digit": "number"}
    return {
        "question_type": question.kind,
        "answer_type": kinds.get(question.kind, "other"),
        "multiple_choice_answer": question.answer,
        "answers": [{"answer": text, "answer_confidence": "yes", "answer_id": number} for number, text in answers],
    }


def _captions(scenes: Sequence[Scene]) -> list[Entry]:
    pairs = [(image_id, caption) for image_id, scene in enumerate(scenes) for caption in captions(scene)]
    return [{"id": i, "image_id": image_id, "caption": caption} for i, (image_id, caption) in enumerate(pairs)]


def _instances(scenes: Sequence[Scene]) -> list[Entry]:
    return [_instance(image_id, k, thing) for image_id, s in enumerate(scenes) for k, thing in enumerate(s.objects)]


def _instance(image_id: int, position: int, thing: SceneObject) -> Entry:
    left, top, right, bottom = thing.box
    return {
        "id": _annotation_id(image_id, position),
        "image_id": image_id,
        "category_id": thing.digit,
        "bbox": [left, top, right - left, bottom - top],
        "area": (right - left) * (bottom - top),
        "iscrowd": 0,
    }


def _refs(scenes: Sequence[Scene], settings: SplitSettings) -> list[Entry]:
    refs: list[Entry] = []
    sent_id = 0
    for image_id, scene in enumerate(scenes):
        said: dict[int, list[str]] = {}
        for expression in refer(scene, settings.expressions, _rng(settings, image_id, "expressions")):
            said.setdefault(scene.objects.index(expression.target), []).append(expression.text)
        for position, texts in sorted(said.items()):
            ref = _ref(len(refs), image_id, position, scene.objects[position], settings.split)
            refs.append(ref | {"sentences": [_sentence(sent_id + k, text) for k, text in enumerate(texts)]})
            sent_id += len(texts)
    return refs


def _ref(ref_id: int, image_id: int, position: int, thing: SceneObject, split: str) -> Entry:
    return {
        "ref_id": ref_id,
        "ann_id": _annotation_id(image_id, position),
        "image_id": image_id,
        "category_id": thing.digit,
        "file_name": file_name(image_id),
        "split": split,
    }


def _sentence(sent_id: int, text: str) -> Entry:
    return {"sent_id": sent_id, "sent": text, "raw": text, "tokens": text.split()}


def _annotation_id(image_id: int, position: int) -> int:
    return image_id * 10 + position


def _rng(settings: SplitSettings, image_id: int, purpose: str) -> Rng:
    words = [zlib.crc32(word.encode()) for word in (settings.split, purpose)]
    return np.random.default_rng([settings.seed, *words, image_id])


def _write(file: Path, document: Any) -> None:
    file.write_text(json.dumps(document), encoding="utf-8")
