"""`moadapt doctor` and `moadapt compose`: adapters of others, from the command line alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moadapt as library
from moadapt.adapters import LoRA
from moadapt.bases import load_base
from moadapt.cli import main
from moadapt_routers import ByTask, Prototypes, TopK
from tests.hub.trained import saved
from tests.models import randomize

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folders(tmp_path: Path, base: str) -> dict[str, str]:
    """Two LoRAs of peft on the base."""
    targets = {"ask": ["q_proj", "v_proj"], "tell": r".*language_model.*\.(up|down)_proj"}
    made = {n: saved(tmp_path / n, load_base(base)[0], r=2, target_modules=t) for n, t in targets.items()}
    return {name: str(folder) for name, folder in made.items()}


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def spoil(folder: str) -> None:
    """Take a half of a LoRA away."""
    found = load_file(Path(folder) / TENSORS)
    save_file(dict(list(found.items())[1:]), Path(folder) / TENSORS)


def test_the_doctor_tells_fates_and_exits_with_1_where_any_is_refused(
    folders: dict[str, str], base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *folders.values(), "--base", base]) == 0
    told = capsys.readouterr().out
    assert told.count("LORA can be composed") == 2
    assert main(["doctor", folders["tell"], "--base", base, "--keys"]) == 0
    assert "model.language_model.layers.0.mlp.up_proj" in capsys.readouterr().out
    spoil(folders["ask"])
    assert main(["doctor", *folders.values(), "--base", base]) == 1
    told = capsys.readouterr().out
    assert "its other half is missing" in told
    assert "refused" in told
    assert "can be composed" in told


def test_the_doctor_speaks_json(folders: dict[str, str], base: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(folders["ask"])
    assert main(["doctor", folders["ask"], folders["tell"], "--base", base, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [each["refused"] for each in found] == [True, False]
    assert {key["fate"] for key in found[1]["keys"]} == {"mapped"}
    assert found[0]["counts"]["refused"] == 1


def test_the_doctor_takes_the_base_that_an_adapter_names_and_its_weights_on_request(
    folders: dict[str, str], base: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert json.loads((Path(folders["ask"]) / CONFIG).read_text())["base_model_name_or_path"] == base
    assert main(["doctor", folders["ask"]]) == 0
    other = load_base(base)[0]
    with torch.no_grad():
        other.get_input_embeddings().weight += 1
    embedding = saved(tmp_path / "embedding", other, r=2, target_modules=["embed_tokens"])
    assert main(["doctor", str(embedding), "--base", base]) == 0
    capsys.readouterr()
    assert main(["doctor", str(embedding), "--base", base, "--weights", "--json"]) == 1
    assert "belongs to another base" in capsys.readouterr().out


def test_adapters_are_composed_and_saved_as_a_mixture(
    folders: dict[str, str], base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = library.attach(load_base(base)[0], experts={"mine": LoRA(rank=3)}, router=ByTask())
    randomize(mine)
    mine.save(tmp_path / "mine")
    named = json.dumps({**folders, "mine": str(tmp_path / "mine")})
    out = tmp_path / "out"
    assert main(["compose", named, "--router", "{name: top_k, k: 2}", "--out", str(out), "--frozen"]) == 0
    assert "ask, tell, mine at" in capsys.readouterr().out
    loaded = library.load(out, load_base(base)[0])
    assert (loaded.experts, loaded.spec.router) == (("ask", "tell", "mine"), TopK(k=2))
    assert loaded.frozen == loaded.experts
    assert main(["compose", named, "--router", "prototypes", "--base", base, "--out", str(out)]) == 0
    assert f"moadapt route {out} --fit" in " ".join(capsys.readouterr().out.split())
    assert library.load(out, load_base(base)[0]).spec.router == Prototypes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compose", "{a: b}"], "give the router with --router"),
        (["compose", "a", "--router", "top_k", "--out", "o"], "the adapters are 'a'; give them by name"),
        (["compose", "{a: nowhere}", "--router", "top_k", "--out", "o"], "there is no folder nowhere"),
        (["compose", "{a: b}", "--router", "topk", "--out", "o"], "topk"),
        (["doctor", "nowhere"], "there is no folder nowhere"),
        (["doctor", "x", "--base", "nowhere"], "the base 'nowhere' cannot be loaded"),
    ],
)
def test_what_is_wrong_is_said_on_one_line(
    arguments: list[Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
