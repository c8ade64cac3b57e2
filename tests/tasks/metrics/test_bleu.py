"""BLEU equals a count by hand, a brute-force count, the public COCO evaluation, and itself on two processes."""

import math
import random
from collections.abc import Callable

import pytest
import torch

from moadapt_tasks.metrics import BLEU, caption_tokens
from moadapt_tasks.metrics.bleu import BleuCounts, bleu_counts, bleu_scores

Captions = tuple[list[str], list[list[str]]]
NAMES = ["bleu_1", "bleu_2", "bleu_3", "bleu_4"]


def values(metric: BLEU) -> dict[str, float]:
    return {name: score.item() for name, score in metric.compute().items()}


def score(preds: list[str], references: list[list[str]], n_gram: int = 4) -> dict[str, float]:
    metric = BLEU(n_gram)
    metric.update(preds, references)
    return values(metric)


def slow_bleu(preds: list[str], references: list[list[str]], longest: int) -> float:
    """Return BLEU of the longest n by looking for every n-gram in every reference."""
    pred_words, reference_words, product = 0, 0, 1.0
    for length in range(1, longest + 1):
        matched, predicted = 0, 0
        for pred, texts in zip(preds, references, strict=True):
            words = caption_tokens(pred)
            runs = [words[start : start + length] for start in range(len(words) - length + 1)]
            for run in {tuple(run) for run in runs}:
                most = 0
                for text in texts:
                    others = caption_tokens(text)
                    places = range(len(others) - length + 1)
                    most = max(most, sum(tuple(others[place : place + length]) == run for place in places))
                matched += min(runs.count(list(run)), most)
            predicted += len(runs)
        product *= (matched + 1e-15) / (predicted + 1e-9)
    for pred, texts in zip(preds, references, strict=True):
        size = len(caption_tokens(pred))
        sizes = sorted(len(caption_tokens(text)) for text in texts)
        pred_words += size
        reference_words += min(sizes, key=lambda other: abs(other - size))
    ratio = (pred_words + 1e-15) / (reference_words + 1e-9)
    return math.pow(product, 1 / longest) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1)


def test_bleu_counts_a_repeated_word_as_often_as_one_reference_has_it() -> None:
    """The example of Papineni et al.: "the" is twice in the first reference, so two of the seven count."""
    references = [["The cat is on the mat", "There is a cat on the mat"]]
    assert score(["the the the the the the the"], references, 1)["bleu_1"] == pytest.approx(2 / 7, abs=1e-9)


def test_bleu_takes_the_closest_reference_and_of_equals_the_shorter() -> None:
    counts = bleu_counts(["a", "b", "c"], [["a"] * 4, ["b"] * 2, ["c"] * 9], n_gram=1)
    assert counts.reference_words == 2


def test_bleu_of_a_short_caption_is_cut_by_its_brevity() -> None:
    """All three words match, and the reference has six: exp(1 - 6/3)."""
    assert score(["a red bus"], [["a red bus in the street"]], 1)["bleu_1"] == pytest.approx(math.exp(-1), abs=1e-8)


def test_bleu_adds_up_counts_over_the_corpus_before_dividing() -> None:
    """One of one word and one of three match: 2/4, where the mean of captions would be 2/3."""
    assert score(["dog", "a big cat"], [["dog"], ["cat on sofa"]], 1)["bleu_1"] == pytest.approx(2 / 4, abs=1e-9)


def test_bleu_of_four_matching_words_is_one_for_every_n() -> None:
    assert score(["a red bus waits"], [["A red bus waits."]]) == pytest.approx(dict.fromkeys(NAMES, 1.0), abs=1e-8)


def test_bleu_without_a_match_is_the_public_constant_over_the_words() -> None:
    assert bleu_scores(BleuCounts([0], [3], words=3, reference_words=3)) == [pytest.approx(1e-15 / (3 + 1e-9))]


def test_bleu_equals_a_brute_force_count() -> None:
    draw = random.Random(0)

    def caption(longest: int) -> str:
        return " ".join(draw.choice("abcd") for _ in range(draw.randint(0, longest)))

    preds = [caption(8) for _ in range(20)]
    references = [[caption(10) for _ in range(draw.randint(1, 4))] for _ in preds]
    for length, name in enumerate(NAMES, start=1):
        assert score(preds, references)[name] == pytest.approx(slow_bleu(preds, references, length), rel=1e-12)


def test_bleu_equals_the_public_coco_evaluation(captions: Captions) -> None:
    """Printed by `Bleu(4).compute_score` of `pycocoevalcap` 1.2 on these captions after its `PTBTokenizer`."""
    public = [0.8508656186107952, 0.6766923084676065, 0.5088863396048110, 0.3684094728515697]
    assert score(*captions) == pytest.approx(dict(zip(NAMES, public, strict=True)), abs=1e-12)


def test_bleu_in_batches_equals_bleu_at_once(captions: Captions) -> None:
    metric = BLEU()
    for pred, texts in zip(*captions, strict=True):
        metric.update([pred], [texts])
    assert values(metric) == score(*captions)


def test_bleu_with_fewer_n_gives_the_first_scores(captions: Captions) -> None:
    whole = score(*captions)
    assert score(*captions, n_gram=2) == {"bleu_1": whole["bleu_1"], "bleu_2": whole["bleu_2"]}


def test_bleu_refuses_no_n_grams() -> None:
    with pytest.raises(ValueError, match="n_gram is 0; give"):
        BLEU(n_gram=0)


@pytest.mark.parametrize("cut", [0, 2, 3, 7])
def test_bleu_on_two_processes_equals_one(
    captions: Captions, on_two_processes: Callable[..., list[dict[str, float]]], cut: int
) -> None:
    assert on_two_processes(BLEU(), *captions, cut) == [score(*captions)] * 4


def test_bleu_on_two_processes_without_rows_is_nan(
    on_two_processes: Callable[..., list[dict[str, float]]],
) -> None:
    for found in on_two_processes(BLEU(n_gram=1), [], [], 0):
        assert torch.tensor(found["bleu_1"]).isnan()
