import numpy as np
import pytest
from sklearn.datasets import load_digits

from moadapt_tasks.digit_scenes import scenes
from moadapt_tasks.digit_scenes.handwriting import SPLITS, handwriting
from moadapt_tasks.digit_scenes.scenes import draw_scene


def samples(split: str) -> list[bytes]:
    hands = handwriting(split)
    return [bytes([digit]) + scan.tobytes() for scan, digit in zip(hands.scans, hands.digits, strict=True)]


def test_every_scan_belongs_to_one_split() -> None:
    scans, digits = load_digits(return_X_y=True)
    known = [
        bytes([digit]) + (scan.reshape(8, 8).astype(np.float32) / 16).tobytes()
        for scan, digit in zip(scans, digits, strict=True)
    ]
    parts = {split: samples(split) for split in SPLITS}
    assert len(set(known)) == len(known)  # no two scans are alike, so none can stand in two splits unseen
    assert sorted(scan for part in parts.values() for scan in part) == sorted(known)
    assert {split: len(part) for split, part in parts.items()} == SPLITS


@pytest.mark.parametrize("split", SPLITS)
def test_draw_scene_uses_the_handwriting_of_its_split(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def record(name: str) -> object:
        asked.append(name)
        return handwriting(name)

    monkeypatch.setattr(scenes, "handwriting", record)
    draw_scene(split, 3)
    assert asked == [split]


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_has_every_digit(split: str) -> None:
    assert set(handwriting(split).digits.tolist()) == set(range(10))


def test_handwriting_refuses_an_unknown_split() -> None:
    with pytest.raises(
        ValueError, match="no split of the handwriting is called 'val'; there are train, validation, test"
    ):
        handwriting("val")
