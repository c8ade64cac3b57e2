"""`moadapt report` on what `moadapt fit` leaves: with routers by token and by sequence, without any, and incomplete."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moadapt.cli import main
from moadapt.cli.run_folder import RunFolder
from tests.cli.conftest import Moadapt
from tests.reporting.parsed_page import ParsedPage


def reported(folder: Path, *arguments: str) -> ParsedPage:
    assert main(["report", str(folder), *arguments]) == 0
    return ParsedPage((folder / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_a_page_shows_what_a_run_left(moadapt: Moadapt, config: dict[str, Any], tmp_path: Path, scope: str) -> None:
    config["model"]["router"]["init_args"] = {"k": 2, "scope": scope}
    config["model"]["placement"] = "all"
    config["model"]["objectives"] = ["mutual_information"]
    assert moadapt("fit", "--trainer.max_epochs", "2", "--trainer.max_steps", "-1") == 0
    assert moadapt("predict") == 0
    page = reported(tmp_path / "run", "--examples", "1")
    assert page.all("p", "nothing") == []
    assert len(page.all("div", "example")) == 2  # one a task
    grids = [svg for svg in page.all("svg", "patched") if svg.attributes["aria-label"].startswith("Patches")]
    assert bool(grids) == (scope == "token")
    patches = [rect for rect in page.all("rect") if "fill-opacity" in rect.attributes.get("style", "")]
    assert len(patches) == 4 * len(grids)
    words = [span.words for span in page.all("span") if "color-mix" in span.attributes.get("style", "")]
    assert bool(words) == (scope == "token")
    assert bool(page.all("div", "bars")) == (scope == "sequence")
    captions = [caption.words for caption in page.all("figcaption")]
    assert {"effective experts", "drift", "objective: mutual_information"} <= set(captions)


def test_a_run_without_router_says_so(moadapt: Moadapt, config: dict[str, Any], tmp_path: Path) -> None:
    del config["model"]["router"], config["model"]["experts"]
    assert moadapt("fit") == 0
    page = reported(tmp_path / "run")
    assert any("Nothing is routed in it" in paragraph.words for paragraph in page.all("p"))


def test_curves_of_several_starts_are_joined(moadapt: Moadapt, config: dict[str, Any], tmp_path: Path) -> None:
    assert moadapt("fit") == 0
    config["trainer"]["max_steps"] = 5
    assert moadapt("fit") == 0
    run = RunFolder(tmp_path / "run")
    assert [step for step, _ in run.losses["all"]] == [0, 1, 2, 3, 4]
    assert run.steps == 5
    assert {"", "language.0", "language.1"} == set(run.measures["entropy"])
    assert "score" in run.scores
    assert run.record == json.loads((tmp_path / "run" / "routing.json").read_text())


def test_what_is_missing_is_told(
    moadapt: Moadapt, config: dict[str, Any], tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    own = tmp_path / "base"
    shutil.copytree(base, own)
    config["model"]["base"] = str(own)
    assert moadapt("fit", "--trainer.limit_val_batches", "0") == 0
    shutil.rmtree(own)
    assert main(["report", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert f"the base '{own}' cannot be loaded" in told
    assert "--examples 0 makes the page without base and data" in told
    assert main(["report", str(tmp_path / "run"), "--examples", "-1"]) == 2
    page = reported(tmp_path / "run", "--examples", "0")
    assert "The routing was not measured in this run." in [note.words for note in page.all("p", "nothing")]
    shutil.rmtree(tmp_path / "run" / "mixture")
    page = reported(tmp_path / "run")
    assert any("no mixture is saved yet" in paragraph.words for paragraph in page.all("p"))
