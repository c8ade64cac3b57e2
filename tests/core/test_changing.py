"""Adapters that come into a mixture and leave it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moadapt import Mixture, RouterSpec, add_adapters, compose, fit_router, remove_adapters
from moadapt_routers import ByTask, Constant, Prototypes, Softmax, TopK
from tests.core.test_composing import assert_same_tensors, tensors_of
from tests.hub.trained import by_peft, outputs, saved
from tests.models import tiny_llama

WORDS = {"input_ids": torch.arange(5, 23).reshape(2, 9)}
TARGETS: dict[str, Any] = {"ask": ["q_proj", "v_proj"], "tell": "all-linear", "find": ["down_proj"]}
RANKS = {"ask": 2, "tell": 5, "find": 3}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {
        name: saved(tmp_path / name, tiny_llama(), r=RANKS[name], target_modules=targets)
        for name, targets in TARGETS.items()
    }


def two(folders: dict[str, Path], router: RouterSpec) -> Mixture:
    return compose(tiny_llama(), {name: folders[name] for name in ("ask", "tell")}, router=router).eval()


def test_what_comes_and_goes_leaves_the_others_as_they_are(folders: dict[str, Path]) -> None:
    mixture = two(folders, ByTask())
    mixture.freeze("ask")
    before = {name: tensors_of(mixture, name) for name in mixture.experts}
    base = mixture.base
    more = add_adapters(mixture, {"find": folders["find"]})
    assert not mixture.attached
    assert (more.experts, more.frozen, more.training) == (("ask", "tell", "find"), ("ask",), False)
    assert more.base is base
    for name, expected in before.items():
        assert_same_tensors(tensors_of(more, name), expected)
    alone = {name: by_peft(folder, tiny_llama(), WORDS) for name, folder in folders.items()}
    for name, expected in alone.items():
        torch.testing.assert_close(outputs(more, WORDS, task=name), expected, rtol=1e-5, atol=1e-5)
    found = tensors_of(more, "find")
    fewer = remove_adapters(more, ["ask"])
    assert fewer.experts == ("tell", "find")
    assert_same_tensors(tensors_of(fewer, "tell"), before["tell"])
    assert_same_tensors(tensors_of(fewer, "find"), found)
    for name in fewer.experts:
        torch.testing.assert_close(outputs(fewer, WORDS, task=name), alone[name], rtol=1e-5, atol=1e-5)
    untouched = tiny_llama()
    assert torch.equal(outputs(fewer.detach(), WORDS), outputs(untouched, WORDS))


@pytest.mark.parametrize("per", ["model", "layer"])
def test_a_trained_router_keeps_what_it_knows_of_those_that_stay(per: Any, folders: dict[str, Path]) -> None:
    mixture = two(folders, Softmax(per=per))
    for parameter in mixture.routers.parameters():
        torch.nn.init.normal_(parameter)
    expected = outputs(mixture, WORDS)
    more = add_adapters(mixture, {"find": folders["find"]})
    with more.only(["ask", "tell"]):
        torch.testing.assert_close(outputs(more, WORDS), expected, rtol=1e-5, atol=1e-5)
    again = remove_adapters(more, ["find"])
    torch.testing.assert_close(outputs(again, WORDS), expected, rtol=1e-5, atol=1e-5)


def test_another_router_starts_afresh_and_a_fitted_one_waits_to_be_fitted(folders: dict[str, Path]) -> None:
    rows = {**WORDS, "task": ["ask", "tell"]}
    mixture = two(folders, Prototypes(k=1))
    fit_router(mixture, rows)
    more = add_adapters(mixture, {"find": folders["find"]})
    with pytest.raises(ValueError, match="was not fitted to these adapters"):
        outputs(more, WORDS)
    other = remove_adapters(more, ["ask"], router=TopK(k=2))
    assert other.spec.router == TopK(k=2)
    assert bool(torch.isfinite(outputs(other, WORDS)).all())


def test_what_is_impossible_leaves_the_mixture_as_it_was(folders: dict[str, Path], tmp_path: Path) -> None:
    dropped = saved(tmp_path / "dropped", tiny_llama(), r=2, lora_dropout=0.5, target_modules=["q_proj"])
    mixture = two(folders, Constant(weights=(0.5, 2.0)))
    expected = outputs(mixture, WORDS)
    one = {"find": folders["find"]}
    cases: list[tuple[Any, str]] = [
        (lambda: add_adapters(mixture, {"ask": folders["find"]}), "taken: ask"),
        (lambda: add_adapters(mixture, {"shared": folders["find"]}), "taken: shared"),
        (lambda: add_adapters(mixture, {}), "new experts are called nothing"),
        (lambda: add_adapters(mixture, {"a/b": folders["find"]}), "adapter name 'a/b' is refused"),
        (lambda: add_adapters(mixture, {"new": tmp_path / "none"}), "there is no folder"),
        (lambda: add_adapters(mixture, {"new": dropped}, router=ByTask()), "share a dropout mask"),
        (lambda: add_adapters(mixture, one), "Constant"),
        (lambda: remove_adapters(mixture, ["ask", "tell"]), "leave at least one"),
        (lambda: remove_adapters(mixture, ["find"]), "cannot remove find from the experts ask, tell"),
        (lambda: remove_adapters(mixture, []), "cannot remove nothing"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            change()
        assert torch.equal(outputs(mixture, WORDS), expected)
    mixture.detach()
    with pytest.raises(ValueError, match="was detached"):
        add_adapters(mixture, one)


def test_a_module_that_one_has_whole_gets_no_second_owner(tmp_path: Path) -> None:
    folders = {
        name: saved(tmp_path / name, tiny_llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
        for name in ("a", "b")
    }
    mixture = compose(tiny_llama(), {"a": folders["a"]}, router=ByTask())
    with pytest.raises(ValueError, match="a and b both have lm_head whole"):
        add_adapters(mixture, {"b": folders["b"]})
