"""CIDEr-D equals a count by hand, a brute-force count, the public COCO evaluation, and itself on two processes."""

import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from moadapt_tasks.metrics import CIDErD, caption_tokens
from moadapt_tasks.metrics.cider_d import cider_d, document_frequencies

Captions = tuple[list[str], list[list[str]]]


def score(preds: list[str], references: list[list[str]]) -> float:
    metric = CIDErD()
    metric.update(preds, references)
    return metric.compute().item()


def slow_cider_d(preds: list[list[str]], references: list[list[list[str]]]) -> float:
    """Return the mean CIDEr-D from vectors over all n-grams of the corpus, one dimension an n-gram."""
    total = 0.0
    for length in range(1, 5):
        everything = [*preds, *(text for texts in references for text in texts)]
        vocabulary = sorted({run for words in everything for run in runs(words, length)})
        seen = [{run for text in texts for run in runs(text, length)} for texts in references]
        weight = np.array([math.log(len(preds) / max(1, sum(run in image for image in seen))) for run in vocabulary])
        for pred, texts in zip(preds, references, strict=True):
            ours = weight * np.array([runs(pred, length).count(run) for run in vocabulary])
            for text in texts:
                theirs = weight * np.array([runs(text, length).count(run) for run in vocabulary])
                scale = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
                cosine = float(np.minimum(ours, theirs) @ theirs) / scale if scale > 0 else 0.0
                gap = len(pred) - len(text)
                total += cosine * math.exp(-(gap**2) / 72) / len(texts)
    return 10 * total / 4 / len(preds)


def runs(words: list[str], length: int) -> list[str]:
    """Return all n-grams of one length, each as a text."""
    return [" ".join(words[start : start + length]) for start in range(len(words) - length + 1)]


def test_cider_d_of_two_images_by_hand() -> None:
    """Every n-gram is in one of two images, so all weigh log 2, and a cosine counts equal n-grams.

    First: one of two words is shared, no pair: (1/2 + 0) / 4 of ten. Second: its words and its pair are, and nothing
    longer exists: (1 + 1) / 4 of ten.
    """
    scores = cider_d([["red", "cat"], ["blue", "bus"]], [[["red", "dog"]], [["blue", "bus"]]])
    assert scores == pytest.approx([10 * 0.5 / 4, 10 * 2 / 4], abs=1e-12)


def test_cider_d_clips_a_repeated_word_and_punishes_its_length() -> None:
    """The prediction's (4) against (1) of the reference: clipped 1 * 1 over norms 4 * 1, three words too long."""
    first = cider_d([["dog"] * 4, ["x"]], [[["dog"]], [["x"]]])[0]
    assert first == pytest.approx(10 / 4 * (1 / 4) * math.exp(-(3**2) / 72), abs=1e-12)


def test_cider_d_gives_nothing_for_words_of_every_image() -> None:
    assert cider_d([["a"], ["a"]], [[["a"]], [["a"]]]) == [0.0, 0.0]


def test_document_frequencies_count_images_not_captions() -> None:
    frequencies = document_frequencies([[["a", "a", "b"], ["a"]], [["a", "c"]]])
    assert (frequencies[("a",)], frequencies[("b",)], frequencies[("a", "b")], frequencies[("d",)]) == (2, 1, 1, 0)


def test_cider_d_equals_a_brute_force_count() -> None:
    draw = random.Random(2)

    def words(longest: int) -> list[str]:
        return draw.choices(["a", "b", "c", "d", "e"], k=draw.randint(0, longest))

    preds = [words(8) for _ in range(15)]
    references = [[words(9) for _ in range(draw.randint(1, 4))] for _ in preds]
    found = cider_d(preds, references)
    assert sum(found) / len(found) == pytest.approx(slow_cider_d(preds, references), rel=1e-12)


def test_cider_d_equals_the_public_coco_evaluation(captions: Captions) -> None:
    """Printed by `Cider().compute_score` of `pycocoevalcap` 1.2 on these captions after its `PTBTokenizer`."""
    assert score(*captions) == pytest.approx(2.219718864998883, abs=1e-12)


def test_cider_d_tokenises_what_it_is_given(captions: Captions) -> None:
    preds, references = captions
    scores = cider_d(
        [caption_tokens(pred) for pred in preds], [[caption_tokens(text) for text in texts] for texts in references]
    )
    assert score(preds, references) == pytest.approx(sum(scores) / len(scores), abs=1e-12)


def test_cider_d_in_batches_takes_document_frequencies_of_all(captions: Captions) -> None:
    metric = CIDErD()
    for pred, texts in zip(*captions, strict=True):
        metric.update([pred], [texts])
    assert metric.compute().item() == score(*captions)


def test_cider_d_after_reset_forgets(captions: Captions) -> None:
    metric = CIDErD()
    metric.update(["a lost caption"], [["a lost caption"]])
    metric.reset()
    metric.update(*captions)
    assert metric.compute().item() == score(*captions)


@pytest.mark.parametrize("cut", [0, 2, 3, 7])
def test_cider_d_on_two_processes_equals_one(
    captions: Captions, on_two_processes: Callable[..., list[dict[str, float]]], cut: int
) -> None:
    assert on_two_processes(CIDErD(), *captions, cut) == [{"value": score(*captions)}] * 4


def test_cider_d_on_two_processes_without_rows_is_nan(
    on_two_processes: Callable[..., list[dict[str, float]]],
) -> None:
    assert all(math.isnan(found["value"]) for found in on_two_processes(CIDErD(), [], [], 0))
