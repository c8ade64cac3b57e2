"""A tiny base, and Lightning's harmless notices silenced as the command silences them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moadapt.cli import main
from tests.training import toy


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny random LLaVA."""
    return toy.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def config(tmp_path: Path, base: str) -> dict[str, Any]:
    """A small run, written with short names."""
    colour = {"class_path": "tests.training.toy.Colour"}
    return {
        "trainer": {
            "default_root_dir": str(tmp_path / "run"), "max_steps": 3, "accelerator": "cpu", "log_every_n_steps": 1
        },
        "model": {
            "base": base,
            "shared": "lora",
            "experts": {"small": {"class_path": "lora", "init_args": {"rank": 2}}, "large": "lora"},
            "router": {"class_path": "top_k", "init_args": {"k": 2}},
            "dtype": "float32",
        },
        "data": {
            "batch_size": 5,
            "tasks": {
                "small": {**colour, "init_args": {"root": str(tmp_path / "small")}},
                "large": {**colour, "init_args": {"root": str(tmp_path / "large"), "rows": 4, "upper": True}},
            },
        },
    }  # fmt: skip


Moadapt = Callable[..., int]


@pytest.fixture
def moadapt(tmp_path: Path, config: dict[str, Any]) -> Moadapt:
    """Run a training command on the configuration, given as a file, with more arguments."""

    def run(command: str, *arguments: str) -> int:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        return main([command, "-c", str(file), *arguments])

    return run
