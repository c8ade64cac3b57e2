from pathlib import Path
from typing import Any

import pytest
import yaml

from moadapt.cli import main
from moadapt.cli.layers import config_files, layered
from moadapt.cli.short_names import resolve

LORA, BOTTLENECK = "moadapt.adapters.lora.LoRA", "moadapt.adapters.bottleneck.Bottleneck"


def load(text: str) -> Any:
    return resolve(yaml.safe_load(text))


@pytest.fixture
def laid(tmp_path: Path) -> Any:
    """Lay configurations over each other, written as files."""

    def lay(*configs: Any) -> Any:
        names = [str(tmp_path / f"{index}.yaml") for index in range(len(configs))]
        for name, config in zip(names, configs, strict=True):
            Path(name).write_text(yaml.safe_dump(config))
        command, given = layered(["fit", *(part for name in names for part in ("-c", name))], load)
        assert command == "fit"
        return yaml.safe_load(given.removeprefix("--config="))

    return lay


def test_files_are_parted_from_other_arguments() -> None:
    given = ["fit", "-c", "a.yaml", "--x", "1", "--config=b=c.yaml", "--config", "d.yaml", "-y"]
    assert config_files(given) == (["a.yaml", "b=c.yaml", "d.yaml"], ["fit", "--x", "1", "-y"])


def test_one_file_is_left_to_the_parser(tmp_path: Path) -> None:
    given = ["fit", "-c", str(tmp_path / "one.yaml"), "--x", "1"]
    assert layered(given, load) == given
    assert layered([*given, "-c", "missing.yaml"], load) == [*given, "-c", "missing.yaml"]


def test_other_options_stay(tmp_path: Path) -> None:
    for name, number in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.yaml").write_text(f"seed_everything: {number}\nrate: 1.0e-05\n")
    found = layered(["fit", "-c", f"{tmp_path}/a.yaml", "--x", "1", f"--config={tmp_path}/b.yaml", "--y"], load)
    assert (found[0], found[2:]) == ("fit", ["--x", "1", "--y"])
    assert yaml.safe_load(found[1].removeprefix("--config=")) == {"seed_everything": 2, "rate": 1e-5}


@pytest.mark.parametrize(
    ("below", "above", "expected"),
    [
        ({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}}, {"a": {"b": 1, "c": [3]}}),
        ({"a": {"b": 1}}, {}, {"a": {"b": 1}}),
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
        (
            {"experts": {"x": "lora", "y": "lora"}},
            {"experts": {"y": None, "z": "bottleneck"}},
            {"experts": {"x": LORA, "z": BOTTLENECK}},
        ),
        (
            {"shared": {"class_path": "lora", "init_args": {"rank": 2, "alpha": 4}}},
            {"shared": {"class_path": LORA, "init_args": {"rank": 3}}},
            {"shared": {"class_path": LORA, "init_args": {"rank": 3, "alpha": 4}}},
        ),
        (
            {"shared": {"class_path": "lora", "init_args": {"rank": 2}}},
            {"shared": {"class_path": "bottleneck", "init_args": {"width": 3}}},
            {"shared": {"class_path": BOTTLENECK, "init_args": {"width": 3}}},
        ),
        (
            {"shared": "lora"},
            {"shared": {"init_args": {"rank": 3}}},
            {"shared": {"class_path": LORA, "init_args": {"rank": 3}}},
        ),
        (
            {"shared": {"class_path": "lora", "init_args": {"rank": 2}}},
            {"shared": "bottleneck"},
            {"shared": BOTTLENECK},
        ),
        (
            {"tasks": {"boxes": {"class_path": "grounding", "init_args": {"refs": "r"}}}},
            {"tasks": {"boxes": {"init_args": {"codec": "paligemma"}}}},
            {
                "tasks": {
                    "boxes": {
                        "class_path": "moadapt_tasks.grounding.Grounding",
                        "init_args": {"refs": "r", "codec": "moadapt_tasks.boxes.paligemma.PaliGemmaBoxes"},
                    }
                }
            },
        ),
    ],
)  # fmt: skip
def test_later_files_win_key_by_key(laid: Any, below: Any, above: Any, expected: Any) -> None:
    assert laid(below, above) == expected


def test_what_no_file_gives_cannot_be_taken_out(laid: Any) -> None:
    with pytest.raises(ValueError, match=r"data.tasks.c is null, and no earlier file gives it; there are a, b"):
        laid({"data": {"tasks": {"a": {}, "b": {}}}}, {"data": {"tasks": {"c": None}}})


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "bad.yaml: "), ("7", "bad.yaml holds 7; give sections"), ("model: {routr: x}", "bad.yaml: ")],
)
def test_a_file_that_cannot_be_used_is_named(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.yaml").write_text("seed_everything: 1\n")
    (tmp_path / "bad.yaml").write_text(text)
    assert main(["fit", "-c", f"{tmp_path}/good.yaml", "-c", f"{tmp_path}/bad.yaml"]) == 2
    assert message in capsys.readouterr().err
