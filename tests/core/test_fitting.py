"""Fitting: what routers are given to fit, and what becomes of it on disk."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moadapt import attach, fit_router, load
from moadapt.adapters import LoRA
from moadapt.fitting import _fitting
from moadapt_routers import Arrow, Constant, Prototypes, Softmax, Spectral
from tests.models import llava_batch, padded, randomize, rows_of, tiny_llava

NAMES = ("a", "b", "c")


def mixture_with(router: object) -> object:
    mixture = attach(tiny_llava(), shared=LoRA(), experts={n: LoRA(rank=2) for n in NAMES}, router=router)
    randomize(mixture, scale=0.1)
    return mixture.eval()


def test_the_loss_of_examples_is_the_mean_over_all_their_answer_tokens() -> None:
    mixture, weights = mixture_with(Constant()), torch.tensor([0.5, -1.0, 2.0])
    batch = llava_batch(answer=4)
    one, rest = rows_of(batch, 0), rows_of(batch, 1, 2)
    rest["labels"] = rest["labels"].clone()
    rest["labels"][:, -2:] = -100
    fitting = _fitting(mixture, 0, [one, rest])
    with torch.no_grad():
        found = fitting.loss(weights)
        with mixture.override(dict(zip(NAMES, weights.tolist(), strict=True))):
            losses: list[Tensor] = []
            for each in (one, rest):
                logits = mixture(**each).logits[:, :-1].flatten(0, 1)
                targets = each["labels"][:, 1:].flatten()
                told = targets != -100
                losses.append(cross_entropy(logits[told], targets[told], reduction="none"))
    assert found == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


@pytest.mark.parametrize("router", [Arrow(), Spectral(), Prototypes()], ids=str)
def test_what_was_fitted_is_saved_and_loaded(router: object, tmp_path: Path) -> None:
    mixture, batch = mixture_with(router), llava_batch()
    mixture.save(tmp_path / "unfitted")
    fit_router(mixture, {**batch, "task": list(NAMES)})
    mixture.save(tmp_path / "fitted")
    with torch.no_grad():
        expected = mixture(**batch).logits
        loaded = load(tmp_path / "fitted", tiny_llava()).eval()
        assert torch.equal(loaded(**batch).logits, expected)
    unfitted = load(tmp_path / "unfitted", tiny_llava()).eval()
    with pytest.raises(ValueError, match="was not fitted"):
        unfitted(**batch)
    fit_router(unfitted, {**batch, "task": list(NAMES)})
    with torch.no_grad():
        assert torch.equal(unfitted(**batch).logits, expected)


def test_fitted_tensors_of_another_shape_are_refused(tmp_path: Path) -> None:
    mixture = mixture_with(Prototypes())
    fit_router(mixture, {**llava_batch(), "task": list(NAMES)})
    mixture.routers[0].remember(means=torch.randn(3, 7))
    mixture.save(tmp_path / "odd")
    with pytest.raises(ValueError, match="of another shape"):
        load(tmp_path / "odd", tiny_llava())


def test_padding_and_batching_of_examples_do_not_matter() -> None:
    batch = {**llava_batch(), "task": list(NAMES)}
    mixture = mixture_with(Prototypes())
    fit_router(mixture, batch)
    expected = [router.means.clone() for router in mixture.routers]
    split = [{**rows_of(llava_batch(), row), "task": NAMES[row]} for row in range(3)]
    for given in (split, {**padded(llava_batch(), 3, "left"), "task": list(NAMES)}):
        fit_router(mixture, given)
        for router, means in zip(mixture.routers, expected, strict=True):
            torch.testing.assert_close(router.means, means, rtol=1e-4, atol=1e-4)


def test_a_trained_router_has_nothing_to_fit() -> None:
    with pytest.raises(ValueError, match=r"Softmax has nothing to fit; train it, or moadapt\.reroute"):
        fit_router(mixture_with(Softmax()), llava_batch())
    with pytest.raises(ValueError, match="a mixture without experts has nothing to fit"):
        fit_router(attach(tiny_llava(), shared=LoRA()), llava_batch())


def test_a_failure_leaves_the_routers_in_their_places() -> None:
    mixture = mixture_with(Prototypes())
    fit_router(mixture, {**llava_batch(), "task": list(NAMES)})
    with torch.no_grad():
        expected = mixture(**llava_batch()).logits
        with pytest.raises(ValueError, match="no example of c"):
            fit_router(mixture, {**llava_batch(), "task": ["a", "b", "b"]})
        assert torch.equal(mixture(**llava_batch()).logits, expected)
