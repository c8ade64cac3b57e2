"""The demonstration on a handful of scenes and steps: everything it promises to leave, and that it goes on."""

import json
from pathlib import Path
from typing import Any

import pytest

from moadapt.demo.running import run_demo
from moadapt.demo.settings import MIXTURE, PER_TASK, SINGLE, DemoSettings
from moadapt.demo.training import train_run

ROWS = ["base", SINGLE, PER_TASK, MIXTURE, "mixture_merged_per_task", "mixture_merged"]


def settings(folder: Path, **changed: Any) -> DemoSettings:
    scenes = {"root": str(folder / "data"), "train": 24, "validation": 2, "test": 3}
    return DemoSettings(**{"steps": 3, "batch_size": 6, "data_options": scenes, **changed})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(settings(folder), folder / "out", "moadapt demo")


def test_demo_writes_the_summary_of_every_row(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    assert json.loads((folder / "out" / "summary.json").read_text()) == summary
    assert [row["name"] for row in summary["rows"]] == ROWS
    for row in summary["rows"]:
        assert set(row["vqa"]) == {"accuracy"}
        assert set(row["grounding"]) == {"accuracy", "mean_iou"}
        assert {"cider_d", "bleu4", "rouge_l"} <= set(row["captioning"])
    assert summary["seed"] == 0
    assert summary["seconds"] > 0


def test_demo_gives_the_single_lora_no_fewer_parameters(finished: tuple[Path, dict[str, Any]]) -> None:
    trained = {row["name"]: row["trainable_parameters"] for row in finished[1]["rows"]}
    assert trained[MIXTURE] <= trained[SINGLE] <= 1.06 * trained[MIXTURE]
    assert trained["base"] == 0


def test_demo_leaves_a_page(finished: tuple[Path, dict[str, Any]]) -> None:
    page = (finished[0] / "out" / "report.html").read_text()
    assert all(name in page for name in ROWS)


def test_demo_reuses_what_is_there(finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, summary = finished
    monkeypatch.setattr("lightning.Trainer.fit", _refuse)
    monkeypatch.setattr("lightning.Trainer.predict", _refuse)
    assert run_demo(settings(folder), folder / "out", "moadapt demo") == summary


def losses(settings: DemoSettings, folder: Path) -> list[tuple[int, float]]:
    data = settings.data_module()
    data.prepare_data()
    data.setup("fit")
    module = settings.modules(data.tasks)[MIXTURE]
    found = train_run(MIXTURE, module, data, settings.key(), settings.steps, folder / "run")["losses"]["all"]
    return [(step, loss) for step, loss in found]


def test_demo_trains_again_with_other_settings(tmp_path: Path) -> None:
    first, other = (losses(settings(tmp_path, **changed), tmp_path) for changed in ({}, {"learning_rate": 1e-3}))
    assert [step for step, _ in first] == [1, 2, 3]
    assert first[0] == other[0]  # the same rows and the same start
    assert first[-1] != other[-1]


def test_what_other_settings_left_is_never_taken_for_this_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = settings(tmp_path), settings(tmp_path, learning_rate=1e-3)
    expected = losses(one, tmp_path)
    for ended in (one, other):
        with monkeypatch.context() as patch:
            patch.setattr("lightning.Trainer.fit", _refuse)  # stops before the first checkpoint
            with pytest.raises(AssertionError, match="a finished demonstration"):
                losses(other, tmp_path)
        again = losses(ended, tmp_path)
        assert (again == expected) == (ended is one)
    assert [step for step, _ in again] == [1, 2, 3]
    assert again[-1] != expected[-1]


def test_demo_asks_again_where_the_base_is_another(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = finished
    monkeypatch.setattr("moadapt.demo.running.fingerprint", lambda base: {"values": "others"})
    monkeypatch.setattr("lightning.Trainer.fit", _refuse)
    monkeypatch.setattr("lightning.Trainer.predict", _refuse)
    with pytest.raises(AssertionError, match="a finished demonstration"):
        run_demo(settings(folder), folder / "out", "moadapt demo")


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a finished demonstration trains and asks nothing again")
