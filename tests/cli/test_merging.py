"""`moadapt merge`: a plain model or a LoRA out of a saved mixture, from the command line alone."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml

import moadapt as library
from moadapt.adapters import LoRA
from moadapt.bases import load_base
from moadapt.cli import main
from moadapt.router import RouterSpec
from moadapt_routers import ByTask, Softmax
from tests.models import randomize


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def file(tmp_path: Path, config: dict[str, Any]) -> str:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return str(tmp_path / "config.yaml")


def saved(tmp_path: Path, base: str, router: RouterSpec) -> str:
    experts = {"small": LoRA(rank=2), "large": LoRA(rank=3)}
    mixture = library.attach(load_base(base)[0], experts=experts, router=router)
    randomize(mixture)
    mixture.save(tmp_path / "mixture")
    return str(tmp_path / "mixture")


def test_it_merges_by_rows_and_scores_before_and_after(
    tmp_path: Path, base: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture, out = saved(tmp_path, base, Softmax()), str(tmp_path / "out")
    told = ["--data", file, "--batches", "2", "--batch_size", "4", "--rank", "3", "--score"]
    assert main(["merge", mixture, "{name: regression, ridge: 0.1}", "--out", out, *told]) == 0
    shown = capsys.readouterr().out
    assert "regression for all tasks" in shown
    assert "no: Softmax weighs experts anew for each input" in shown
    assert "left out by rank 3" in shown
    report = json.loads(Path(f"{out}.report.json").read_text())
    assert report["before"].keys() == report["after"].keys()
    assert "small/exact" in report["before"]
    assert len(report["curve"]) == 6
    merged = load_base(out)[0]
    assert type(merged) is type(load_base(base)[0])
    page = Path(f"{out}.report.html").read_text()
    assert "This merge is not exact" in page
    assert page.count("<svg") == 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_merge_for_one_task_is_exact_in_memory_and_from_files(stream: bool, tmp_path: Path, base: str) -> None:
    mixture, out = saved(tmp_path, base, ByTask()), str(tmp_path / "out")
    flags = ["--stream", "--shard_size", "100KB"] if stream else []
    assert main(["merge", mixture, "task", "--out", out, "--tasks", "[large]", *flags]) == 0
    expected, _ = library.load(mixture, load_base(base)[0]).merge("task", task="large")
    found = load_base(out)[0]
    assert all(torch.equal(found.get_parameter(name), p) for name, p in expected.named_parameters())
    assert json.loads(Path(f"{out}.report.json").read_text())["exact"]


def test_a_lora_of_some_rank_is_one_of_peft(tmp_path: Path, base: str) -> None:
    mixture, out = saved(tmp_path, base, ByTask()), str(tmp_path / "out")
    assert main(["merge", mixture, "{name: ties, density: 0.5}", "--out", out, "--peft", "--rank", "2"]) == 0
    assert peft.PeftConfig.from_pretrained(out).r == 2


def test_what_does_not_fit_is_told_and_nothing_is_written(
    tmp_path: Path, base: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture, out = saved(tmp_path, base, Softmax()), str(tmp_path / "out")
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, told in {
        ("uniform",): "merge needs a folder to write; give --out",
        ("uniform", "--out", mixture): "exists already",
        (
            "regression",
            "--out",
            out,
        ): "merge 'regression' averages what Softmax decides input by input: give calibration",
        ("regression", "--out", out, "--stream"): "looks at rows, for which the whole base must run",
        ("uniform", "--out", out, "--stream", "--peft"): "a streamed merge looks at no rows and writes a model",
        ("uniform", "--out", out, "--score"): "scores are those of a model on test rows; give --data",
        ("uniform", "--out", out, "--dtype", "int8"): "give float32, bfloat16 or float16",
        ("uniforms", "--out", out): "did you mean uniform?",
        ("uniform", "--out", out, "--data", file, "--max_error", "0.001"): "relative errors pass 0.001",
    }.items():
        assert main(["merge", mixture, *arguments]) == 2
        assert told in " ".join(capsys.readouterr().err.split())
        assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("small", "large")) == before
