"""Metrics that are Java programs: what they need is asked for before anything is generated."""

import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moadapt.registry import TEXT_METRICS
from moadapt_tasks.captioning import Captioning
from moadapt_tasks.metrics import java_captions

NAMES = ("meteor", "spice")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_is_named_when_a_task_is_made(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=rf"{name.upper()} runs through pycocoevalcap; run `pip install moadapt\[java\]`"
    ):
        Captioning(captions="{split}.json", images="{file_name}", more_metrics=[name])


@pytest.mark.parametrize("name", NAMES)
def test_java_and_the_parser_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    found: Any = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(ValueError, match="runs on Java; install it"):
        TEXT_METRICS.get(name)()
    monkeypatch.setattr(shutil, "which", lambda program: "/bin/java")
    if name == "spice":
        with pytest.raises(ValueError, match=r"SPICE's parser is not at .*get_stanford_models"):
            TEXT_METRICS.get(name)()
    else:
        metric = TEXT_METRICS.get(name)()
        metric.update(["A dog."], [["The dog!", "22 3/4 miles"]])
        assert metric.kept() == [["a dog", "the dog", "22\xa03/4 miles"]]


def test_a_program_gets_captions_under_their_rows() -> None:
    class Program:
        def compute_score(self, gts: Any, res: Any) -> tuple[float, Any]:
            assert gts == {0: ["b", "c"], 1: ["e"]}
            assert res == {0: ["a"], 1: ["d"]}
            return 0.5, None

    assert java_captions.corpus_score(Program(), [["a", "b", "c"], ["d", "e"]]) == 0.5


def test_a_single_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`more_metrics` is 'meteor'; give a list of names"):
        Captioning(captions="{split}.json", images="{file_name}", more_metrics="meteor")
