"""Broken and hostile folders: each is refused with a reason in under a second, or read rightly; nothing runs."""

import random
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from moadapt import Mixture, compose
from moadapt.hub import examine
from moadapt_routers import ByTask
from tests.hub.hostile import NAMED, SOUND, Make, cases
from tests.hub.trained import outputs, saved
from tests.models import tiny_llama

WORDS = {"input_ids": torch.arange(5, 23).reshape(2, 9)}
CASES = list(cases())
MOST = 512 * 2**20
"""Bytes that reading may add to the memory of the process."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    return saved(tmp_path_factory.mktemp("sound") / "it", tiny_llama(), **options)


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny_llama()


def composed(folder: Path, base: PreTrainedModel) -> Mixture:
    return compose(base, {"it": folder}, router=ByTask()).eval()


def test_there_are_two_hundred() -> None:
    assert len(CASES) >= 200
    assert len({name for name, _ in CASES}) == len(CASES)
    assert set(NAMED) >= SOUND


@pytest.mark.parametrize(("name", "make"), [pytest.param(name, make, id=name) for name, make in CASES])
def test_a_hostile_folder_is_refused_or_read_rightly(
    name: str, make: Make, sound: Path, base: PreTrainedModel, tmp_path: Path
) -> None:
    folder = tmp_path / "it"
    shutil.copytree(sound, folder)
    make(folder, random.Random(name))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    diagnosis, found = examine(folder, base)
    spent = time.process_time() - began
    assert spent < 1
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST
    assert not (folder / "run").exists()
    assert diagnosis.refused == (found is None)
    if name in SOUND:
        assert not diagnosis.refused, diagnosis
    if diagnosis.refused:
        with pytest.raises(ValueError, match=r"is refused: .{10}"):
            diagnosis.check()
        return
    mixture = composed(folder, base)
    try:
        assert bool(torch.isfinite(outputs(mixture, WORDS, task="it")).all())
    finally:
        mixture.detach()


@pytest.mark.parametrize("name", sorted(SOUND))
def test_what_is_sound_in_an_unusual_way_is_read_rightly(
    name: str, sound: Path, base: PreTrainedModel, tmp_path: Path
) -> None:
    folder = tmp_path / "it"
    shutil.copytree(sound, folder)
    NAMED[name](folder, random.Random(name))
    mixture = composed(sound, base)
    expected = outputs(mixture, WORDS, task="it")
    mixture.detach()
    mixture = composed(folder, base)
    found = outputs(mixture, WORDS, task="it")
    mixture.detach()
    assert torch.equal(found, expected)
