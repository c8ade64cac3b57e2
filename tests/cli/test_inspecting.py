"""`moadapt inspect`: no weights, one report, as tables or as JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from moadapt.adapters import LoRA
from moadapt.bases import base_folder, load_base, outline
from moadapt.cli import main
from moadapt.inspection import inspection
from tests.training import toy


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A folder that holds a config and nothing else."""
    AutoConfig.from_pretrained(base_folder("digit_scenes")).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["inspect", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_an_outline_has_no_weights(folder: str) -> None:
    assert {parameter.device.type for parameter in outline(folder).parameters()} == {"meta"}


def test_the_tables_fit_and_name_everything(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["inspect", folder, "--placement", "sparse"]) == 0
    out = capsys.readouterr().out
    for part in ("model.vision_tower", "4 of 4", "0, 2", "self_attn", "AdamW", "for each vision token", "never read"):
        assert part in out
    assert max(map(len, out.splitlines())) <= 100


def test_json_follows_placement_family_and_rank(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    default = told(capsys, folder)
    assert default["adapter"]["name"] == "lora"
    assert {group["tower"] for group in default["groups"] if group["adapted"]} == {"language"}
    doubled = told(capsys, folder, "--rank", str(2 * default["adapter"]["rank"]))
    assert doubled["added"] == 2 * default["added"]
    placed = told(capsys, folder, "--placement", "{towers: [vision], depth: [0.5, 1]}")
    assert {(tower, layer) for tower, layer, _ in placed["added_by_layer"]} == {("vision", 2), ("vision", 3)}
    other = told(capsys, folder, "--family", "{name: bottleneck, width: 3}")
    assert (other["adapter"]["width"], other["memory"]["merged"]) == (3, None)
    recipe = told(capsys, folder, "--preset", "vqa")
    assert (recipe["adapter"]["rank"], recipe["adapter"]["placement"]["every"]) == (24, 2)
    narrow = told(capsys, folder, "--preset", "vqa", "--rank", "3")
    assert (narrow["adapter"]["rank"], narrow["adapter"]["alpha"]) == (3, 6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--placement", "tops"], "no placement is called 'tops'; there are all, top"),
        (["--placement", "{layers: 3}"], "Placement got wrong fields (unknown: layers"),
        (["--placement", "{modules: [q_proj]}"], "is found in the language tower (4 times) and the vision tower"),
        (["--preset", "ocr"], "no preset is called 'ocr'; there are vqa, captioning, grounding"),
        (["--family", "loras"], "no adapter family is called 'loras'; did you mean lora"),
        (["--family", "bottleneck", "--rank", "3"], "Bottleneck has no rank; give --family '{name: bottleneck, ...}'"),
        (["--preset", "vqa", "--family", "bottleneck"], "--preset vqa and --family bottleneck both name the adapter's"),
        (
            ["--family", "{name: lora, placement: top}", "--placement", "vision"],
            "both give placement; give one of them",
        ),
        (["--family", "{name: lora, rank: 4}", "--rank", "8"], "both give rank; give one of them"),
        (["--placement", "{unread: maybe}"], "Placement got unread='maybe'; give true or false"),
        (
            ["--placement", "{towers: [vision], depth: 0.5}"],
            "Placement got depth=0.5; give a list of 2: a number, a number",
        ),
        (["--placement", "{depth: [a, b]}"], "Placement got depth=('a', 'b'); give a list of 2"),
        (["--placement", "{depth: null}"], "Placement got depth=None; give a list of 2"),
        (["--placement", "{every: two}"], "Placement got every='two'; give a whole number"),
        (["--placement", "{every: 1.5}"], "Placement got every=1.5; give a whole number"),
        (["--placement", ""], "'' is neither a name nor a mapping"),
        (["--placement", "3"], "'3' is neither a name nor a mapping"),
        (["--family", ""], "'' is neither a name nor a mapping"),
        (["--family", "3"], "'3' is neither a name nor a mapping"),
        (["--family", "{rank: 3}"], "{'rank': 3} lacks the name of its adapter family"),
        (["--family", "{name: lora, rank: x}"], "LoRA got rank='x'; give a whole number"),
        (["--family", "{name: lora, rank: 8.5}"], "LoRA got rank=8.5; give a whole number"),
        (["--placement", "{towers: vision}"], "Placement got towers='vision'; give a list, each text"),
        (["--placement", "{modules: q_proj}"], "Placement got modules='q_proj'; give a list, each text"),
        (["--placement", "{towers: []}"], "placement got towers empty; name what is wanted, or leave towers out"),
        (["--placement", "{modules: []}"], "placement got modules empty"),
        (["--placement", "{depth: {}}"], "placement got depth empty"),
        (["--placement", "{kinds: []}"], "Placement(kinds=()) matches no site of this base; kinds is empty"),
        (["--placement", "{depth: [0.1, 0.2]}"], "matches no site of this base; no block begins at depth (0.1, 0.2)"),
        (["--rank", "x"], "inspect: Parser key \"rank\":\n    - Expected a <class 'int'>\n  Given value: x\n"),
        (["--family", "{name"], "'{name' is neither a name nor a mapping"),
    ],
    ids=str,
)
def test_what_is_unknown_is_told_in_one_message(
    given: list[str], message: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", folder, *given]) == 2
    assert message in capsys.readouterr().err


def test_a_base_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert (
        "cannot be loaded; give a folder, a hub name, or one of those shipped: digit_scenes" in capsys.readouterr().err
    )


def test_the_memory_of_a_configured_training_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = toy.write_base(tmp_path / "base")
    config = {
        "trainer": {"default_root_dir": str(tmp_path / "run"), "max_steps": 3, "accelerator": "gpu", "devices": 2},
        "model": {"base": base, "shared": "lora", "dtype": "float32"},
        "data": {
            "batch_size": 4,
            "tasks": {"one": {"class_path": "tests.training.toy.Colour", "init_args": {"root": str(tmp_path / "one")}}},
        },
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    found = told(capsys, "--train", str(file))
    trained = inspection(outline(base), LoRA()).memory
    assert (found["gradients"], found["optimizer"]) == (trained.gradients, trained.optimizer)
    sizes = load_base(base)[0].state_dict().values()
    assert found["base"] >= sum(tensor.numel() * tensor.element_size() for tensor in sizes)
    assert found["total"] > found["base"] + found["adapters"] + found["optimizer"] + found["kept"]
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["inspect", "--train", str(file)]) == 0
    assert "2 rows of" in capsys.readouterr().out
    config["model"]["gradient_checkpointing"] = True  # type: ignore[index]
    file.write_text(yaml.safe_dump(config))
    assert told(capsys, "--train", str(file))["kept"] < found["kept"]


@pytest.mark.parametrize("given", [[], ["digit_scenes", "--train", "x.yaml"]])
def test_a_base_or_a_training_is_inspected(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *given]) == 2
    assert "exactly one of them" in capsys.readouterr().err
