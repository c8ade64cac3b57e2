import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import moadapt as library
from moadapt import Placement
from moadapt.bases import load_base
from moadapt.cli.trainer import Interface
from moadapt.mixture import Mixture
from moadapt.registry import OBJECTIVES
from moadapt.specs import fields_of
from tests.cli.conftest import Moadapt
from tests.training.cramped import short_files

ROOT = Path(__file__).parents[2]


def test_fit_with_ranks_leaves_a_trimmed_mixture_and_tests_its_checkpoint(
    moadapt: Moadapt, tmp_path: Path, base: str, config: dict[str, Any]
) -> None:
    config["model"]["ranks"] = {"class_path": "importance", "init_args": {"budget": 30, "every": 1, "settle": 0.4}}
    assert moadapt("fit") == 0
    assert moadapt("test") == 0
    mixture = library.load(tmp_path / "run" / "mixture", load_base(base)[0])
    assert sum(len(bank.state(name)["up"]) for _, bank in mixture.banks() for name in bank.names) == 30
    assert (tmp_path / "run" / "ranks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("steps", [None, [[0.5, 1], [1, 3]]], ids=["published", "own"])
def test_fit_takes_a_schedule_of_ranks(
    moadapt: Moadapt, tmp_path: Path, base: str, config: dict[str, Any], steps: list[list[float]] | None
) -> None:
    config["model"]["ranks"] = {"class_path": "depth_schedule", "init_args": {"steps": steps}} if steps else None
    assert moadapt("fit", *([] if steps else ["--model.ranks", "depth_schedule"])) == 0
    mixture = library.load(tmp_path / "run" / "mixture", load_base(base)[0])
    found = {s.layer: len(bank.state("shared")["up"]) for s, bank in mixture.banks() if s.layer is not None}
    depths = {layer: layer / (max(found) + 1) for layer in found}
    expected = steps or [[0.25, 8], [0.75, 32], [1, 16]]
    assert found == {layer: next(rank for until, rank in expected if u < until) for layer, u in depths.items()}


def test_fit_leaves_checkpoint_mixture_settings_and_logs(moadapt: Moadapt, tmp_path: Path, base: str) -> None:
    own = "{towers: [language], depth: {language: [0.5, 1]}, every: 2}"
    given = ["--model.experts.small.rank", "3", "--model.placement", "language"]
    assert moadapt("fit", *given, "--model.experts.small.placement", own) == 0
    run = tmp_path / "run"
    assert not (run / "ranks.png").exists()  # each adapter has one rank everywhere
    stored = torch.load(run / "last.ckpt", weights_only=True)
    assert stored["global_step"] == 3
    assert load_file(run / "mixture" / "adapters.safetensors").keys() == stored["state_dict"].keys()
    assert library.load(run / "mixture", load_base(base)[0]).tasks == ("small", "large")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["model"]["router"]["class_path"] == "moadapt_routers.top_k.TopK"
    assert settings["model"]["experts"]["small"]["init_args"]["rank"] == 3
    assert settings["data"]["base"] == base
    stored_spec = json.loads((run / "mixture" / "mixture.json").read_text())
    assert stored_spec["placement"] == fields_of(Placement.named("language"))
    assert stored_spec["experts"][0]["placement"]["depth"] == {"language": [0.5, 1]}
    header = next((run / "csv").rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    assert {"loss", "loss/small", "loss/large"} <= set(header)
    assert list((run / "tensorboard").glob("events.*"))


def test_the_same_command_goes_on_and_other_settings_are_refused(
    moadapt: Moadapt, config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = tmp_path / "run" / "last.ckpt"
    assert moadapt("fit") == 0
    config["trainer"]["max_steps"] = 5
    assert moadapt("fit") == 0
    stored = torch.load(last, weights_only=True)
    assert (stored["global_step"], stored["MixedTasks"]["epoch"], stored["MixedTasks"]["step"]) == (5, 2, 1)
    assert moadapt("fit", "--model.router.temperature", "2") == 2
    told = capsys.readouterr().err
    assert "model.router.init_args.temperature was 1.0 and is 2.0" in told
    assert "--resume false" in told
    assert moadapt("fit", "--trainer.accumulate_grad_batches", "2") == 2
    assert "trainer.accumulate_grad_batches was 1 and is 2" in capsys.readouterr().err
    assert moadapt("fit", "--model.gradient_checkpointing", "true", "--data.eval_batch_size", "1") == 0
    assert moadapt("fit", "--keep_every", "0", "--trainer.max_steps", "6") == 2
    assert "every 0 steps; give at least 1" in capsys.readouterr().err
    assert moadapt("fit", "--model.router.temperature", "2", "--resume", "false", "--trainer.max_steps", "1") == 0
    assert torch.load(last, weights_only=True)["global_step"] == 1


def test_test_and_predict_take_the_trained_adapters(moadapt: Moadapt, config: dict[str, Any], tmp_path: Path) -> None:
    config["model"]["optimization"] = {"learning_rate": 0.05, "warmup": 0}
    assert moadapt("fit") == 0
    assert moadapt("validate") == 0
    assert moadapt("test") == 0
    assert moadapt("predict") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert sorted((row["task"], row["row"]) for row in rows) == [
        *(("large", row) for row in range(6, 10)), *(("small", row) for row in range(6))
    ]  # fmt: skip
    assert all(set(row) == {"task", "row", "images", "prompt", "text", "prediction", "reference"} for row in rows)


def test_the_last_checkpoint_is_the_runs_own(
    moadapt: Moadapt, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moadapt("test", "--ckpt_path", "last") == 2
    assert "last.ckpt, which is no file" in capsys.readouterr().err
    assert moadapt("fit") == 0
    assert moadapt("predict") == 0
    file = tmp_path / "run" / "predictions.jsonl"
    predictions = file.read_text()
    file.unlink()
    assert moadapt("predict", "--ckpt_path", "last") == 0
    assert file.read_text() == predictions
    assert moadapt("predict", "--ckpt_path", "best") == 2
    assert "ckpt_path is best, which is no file" in capsys.readouterr().err


@pytest.mark.parametrize("spoil", ["cut", "garbage", "empty"])
def test_a_broken_checkpoint_is_named(
    moadapt: Moadapt, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: str
) -> None:
    assert moadapt("fit", "--trainer.max_steps", "1") == 0
    file = tmp_path / "run" / "last.ckpt"
    file.write_bytes({"cut": file.read_bytes()[:1000], "garbage": b"garbage" * 99, "empty": b""}[spoil])
    assert moadapt("test") == 2
    assert "last.ckpt is broken: File is not a zip file" in capsys.readouterr().err


def test_a_broken_checkpoint_falls_back_to_the_one_before(
    moadapt: Moadapt, config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    assert moadapt("fit", "--keep_every", "1", "--trainer.max_steps", "4") == 0
    whole = load_file(run / "mixture" / "adapters.safetensors")
    assert torch.load(run / "last-1.ckpt", weights_only=True)["global_step"] == 3
    (run / "last.ckpt").write_bytes(bytes(1000))
    assert moadapt("fit", "--keep_every", "1", "--trainer.max_steps", "4", "--resume", "true") == 0
    assert "last.ckpt is broken (File is not a zip file); going on from last-1.ckpt, the one before" in caplog.text
    assert [torch.load(run / name, weights_only=True)["global_step"] for name in ("last.ckpt", "last-1.ckpt")] == [4, 3]
    again = load_file(run / "mixture" / "adapters.safetensors")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_broken_checkpoints_alone_and_none_where_one_is_asked_for_are_refused(
    moadapt: Moadapt, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moadapt("fit", "--resume", "true") == 2
    assert "holds no last.ckpt; leave it out to start" in capsys.readouterr().err
    (tmp_path / "run").mkdir(exist_ok=True)
    for name in ("last.ckpt", "last-1.ckpt"):
        (tmp_path / "run" / name).write_bytes(b"garbage" * 99)
    assert moadapt("fit") == 2
    told = capsys.readouterr().err
    assert told.count("is broken (File is not a zip file)") == 2
    assert "remove what is broken to start over" in told
    assert moadapt("fit", "--resume", "false") == 0
    assert [file.name for file in (tmp_path / "run").glob("last*")] == ["last.ckpt"]


def test_a_mixture_that_finds_no_room_is_written_by_the_same_command_later(
    moadapt: Moadapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, run = Mixture.save, tmp_path / "run"

    def cramped(mixture: Mixture, folder: Path) -> None:
        with short_files():
            save(mixture, folder)

    with monkeypatch.context() as full:
        full.setattr(Mixture, "save", cramped)
        assert moadapt("fit") == 1
    assert "the training is done and kept, but the mixture could not be written" in capsys.readouterr().err
    assert not [file for file in run.iterdir() if "mixture" in file.name]
    kept = (run / "last.ckpt").read_bytes()
    assert moadapt("fit") == 0
    stored = torch.load(io.BytesIO(kept), weights_only=True)["state_dict"]
    found = load_file(run / "mixture" / "adapters.safetensors")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())


def test_testing_before_training_says_what_to_do(moadapt: Moadapt, capsys: pytest.CaptureFixture[str]) -> None:
    assert moadapt("test") == 2
    assert "train first with `moadapt fit`, or give --ckpt_path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("trainer", "max_step", "trainer has no setting 'max_step'; did you mean max_steps? It accepts accelerator"),
        ("model", "rooter", "model has no setting 'rooter'; did you mean router? It accepts base, experts"),
        ("data", "sed", "data has no setting 'sed'; It accepts tasks"),
    ],
)
def test_a_wrong_key_is_answered_with_the_accepted_ones(
    moadapt: Moadapt,
    config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    section: str,
    key: str,
    message: str,
) -> None:
    config[section][key] = 1
    assert moadapt("fit") == 2
    assert message in capsys.readouterr().err


def test_a_wrong_name_is_answered_with_the_near_ones(moadapt: Moadapt, capsys: pytest.CaptureFixture[str]) -> None:
    assert moadapt("fit", "--model.router", "topk") == 2
    assert "no router is called 'topk'; did you mean top_k, top_p?" in capsys.readouterr().err


def test_one_seed_is_that_of_data_and_model(moadapt: Moadapt, tmp_path: Path) -> None:
    assert moadapt("fit", "--seed_everything", "7", "--trainer.max_steps", "1") == 0
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (settings["model"]["seed"], settings["data"]["seed"]) == (7, 7)


class Parsed(Interface):
    """Instantiates everything and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_every_objective_is_taken_from_a_file_and_from_the_command_line(
    config: dict[str, Any], tmp_path: Path, name: str
) -> None:
    config["model"]["objectives"] = [{"class_path": name, "init_args": {"weight": 0.5}}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    made = Parsed(["fit", "-c", str(tmp_path / "config.yaml"), f"--model.objectives+={name}"])
    assert [type(each) for each in made.model.objectives.values()] == [OBJECTIVES.get(name)] * 2
    assert made.model.objectives[name].weight == 0.5


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_run_of_one_file_builds_on_a_tiny_base(file: Path, base: str, tmp_path: Path) -> None:
    made = Parsed(["fit", "-c", str(file), "--model.base", base, "--trainer.default_root_dir", str(tmp_path)])
    made.model.configure_model()
    assert list(made.model.mixture.banks())
    assert made.datamodule.base == base


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_command_and_the_same_command_goes_on(
    config: dict[str, Any], tmp_path: Path, stop: signal.Signals
) -> None:
    config["trainer"]["max_steps"] = 60
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    code = "import sys; from moadapt.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "fit", "-c", str(tmp_path / "config.yaml")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        assert child.stdout is not None
        first = child.stdout.readline()
        while not first.startswith("step 2:"):  # the first epoch's validation
            assert first, "the command ended"
            first = child.stdout.readline()
        child.send_signal(stop)
        rest = child.stdout.read()
    assert child.returncode == 128 + stop, rest
    assert "the same command goes on from there" in rest
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] < 60
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 60
