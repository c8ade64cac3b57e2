"""Bases of every class are loaded from their folders, model and processor."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from moadapt.bases import load_base, outline
from moadapt.processors import NoVideos
from tests.bases.twins import NAMES, twin


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A twin as published bases lie on disk; the folder has the name of its class."""
    written = twin(request.param)
    written.model.save_pretrained(tmp_path / request.param)
    written.processor.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def test_a_base_is_loaded_as_it_was_written(folder: Path) -> None:
    written = twin(folder.name)
    model, processor = load_base(str(folder))
    assert type(model) is type(written.model)
    assert not model.training
    expected = written.model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert type(processor).__name__ == type(written.processor).__name__
    assert getattr(processor, "chat_template", None) == getattr(written.processor, "chat_template", None)
    assert {path for path, _ in outline(str(folder)).named_modules()} == {path for path, _ in model.named_modules()}


def test_a_loaded_processor_is_saved_and_pickled_as_it_was(folder: Path, tmp_path: Path) -> None:
    _, processor = load_base(str(folder))
    processor.save_pretrained(tmp_path / "again")
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "chat_template.jinja"):
        first, second = (where / name for where in (folder, tmp_path / "again"))
        assert first.exists() == second.exists()
        assert not first.exists() or first.read_text() == second.read_text()
    copy = pickle.loads(pickle.dumps(processor))
    assert type(copy).__name__ == type(processor).__name__
    assert repr(copy) == repr(processor)


@pytest.mark.parametrize("suffix", ["", "Fast"])
@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "mllama"])
def test_processors_are_found_where_older_versions_wrote_them(name: str, suffix: str, tmp_path: Path) -> None:
    written = twin(name)
    written.model.save_pretrained(tmp_path)
    written.processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    settings.pop("video_processor", None)
    kind = type(written.processor.image_processor).__name__
    images = {
        **settings.pop("image_processor"),
        "image_processor_type": kind.removesuffix("Pil") + suffix,
        "processor_class": settings["processor_class"],
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    _, processor = load_base(str(tmp_path))
    assert type(processor).__name__ == type(written.processor).__name__
    assert processor.image_processor.size == written.processor.image_processor.size


def test_videos_are_refused_without_torchvision() -> None:
    with pytest.raises(ImportError, match="videos need torchvision"):
        NoVideos(size={"height": 8})(videos=[])
