"""Quantised bases of every class do what plain ones must do with adapters in all their towers."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.bases.checks import CHECKS, EXCUSES, case_of
from tests.bases.twins import NAMES
from tests.quantised.bases import quantised

_QUICK = {"bert", "vit", "qwen2_5_vl"}
_LEFT_OUT = {"attach"}  # it compares weights by an operation that torchao has not; see `test_training`


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("check", [name for name in CHECKS if name not in _LEFT_OUT])
@pytest.mark.parametrize("way", ["int8", "nf4"])
@pytest.mark.parametrize(
    "name", [name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_it_passes(name: str, way: str, check: str, tmp_path: Path) -> None:
    if (name, check) in EXCUSES:
        pytest.skip(EXCUSES[name, check])
    if (name, way) == ("gpt2", "int8"):
        pytest.skip("torchao finds no linear layer in it")
    case = case_of(name)
    case.of.model.save_pretrained(tmp_path)
    case.of.processor.save_pretrained(tmp_path)
    CHECKS[check](replace(case, of=replace(case.of, model=quantised(str(tmp_path), way))))
