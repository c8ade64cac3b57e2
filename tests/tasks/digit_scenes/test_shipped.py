from pathlib import Path

import pytest

from moadapt.registry import BASES
from moadapt_tasks.digit_scenes import shipped
from moadapt_tasks.digit_scenes.recipe import PretrainSettings
from moadapt_tasks.digit_scenes.shipped import DigitScenesBase


def test_digit_scenes_base_is_registered() -> None:
    assert BASES.get("digit_scenes") is DigitScenesBase


def test_folder_stands_beside_the_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "files", lambda package: tmp_path / package)
    weights = tmp_path / "moadapt_tasks.digit_scenes" / "weights"
    weights.mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"weights holds no base; make it with `moadapt pretrain digit_scenes --out .*weights`"
    ):
        DigitScenesBase().folder()
    (weights / "config.json").write_text("{}")
    assert DigitScenesBase().folder() == weights


def test_pretrain_hands_the_settings_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(shipped, "pretrain", lambda *arguments: calls.append(arguments))
    DigitScenesBase().pretrain(tmp_path / "out", tmp_path / "work", list_steps=3, seed=2)
    assert calls == [(tmp_path / "out", PretrainSettings(list_steps=3, seed=2), tmp_path / "work")]


def test_pretrain_refuses_an_unknown_setting(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the recipe has no steps; it has patch_steps, list_steps"):
        DigitScenesBase().pretrain(tmp_path, tmp_path, steps=3)
