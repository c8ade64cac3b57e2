"""Our metrics beside the programs that define them: pycocoevalcap's and the official VQA evaluation's.

    pip install moadapt[java] && pip install --no-deps salesforce-lavis anls
    python -m pytest -m slow tests/parity

Captions are cut by our tokeniser first, as the public evaluation cuts them by its own; `java_tokens.py` compares those.
`salesforce-lavis` ships the official VQA evaluation, of which one file is loaded.
"""

import importlib.metadata
import importlib.util
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from nasty_texts import ABBREVIATIONS, CONTRACTIONS, LETTERS, NUMBERS, SIGNS, WORDS, corpus

from moadapt_tasks.metrics import ANLS, BLEU, METEOR, ROUGEL, CIDErD, VQAAccuracy
from moadapt_tasks.metrics.caption_tokens import spaced_caption_tokens

pytestmark = pytest.mark.slow
CLOSE = 1e-10
HAND_MADE = (
    ["", "a", "the", "don't", "22 3/4 miles", "A RED DOG.", "caf\u00e9 (open)"],
    [["a dog"], ["a", ""], ["the the", "a"], ["do not", "don't"], ["22 3/4 miles", "22"], ["a red dog"], ["a cafe"]],
)


def corpora() -> list[tuple[list[str], list[list[str]]]]:
    return [HAND_MADE, *(corpus(200, seed) for seed in range(3))]


def tokenised(preds: list[str], references: list[list[str]]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    def words(text: str) -> str:
        return " ".join(spaced_caption_tokens(text))

    return (
        {row: [words(text) for text in texts] for row, texts in enumerate(references)},
        {row: [words(pred)] for row, pred in enumerate(preds)},
    )


@pytest.mark.parametrize("number", range(4))
def test_caption_metrics_are_those_of_pycocoevalcap(number: int) -> None:
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge()
    preds, references = corpora()[number]
    gts, res = tokenised(preds, references)
    ours: dict[str, float] = {}
    for metric in (BLEU(), CIDErD(), ROUGEL()):
        metric.update(preds, references)
        found = metric.compute()
        ours |= found if isinstance(found, dict) else {type(metric).__name__: found}
    expected = dict(
        zip(("bleu_1", "bleu_2", "bleu_3", "bleu_4"), bleu.compute_score(gts, res, verbose=0)[0], strict=True)
    )
    expected |= {"CIDErD": cider.compute_score(gts, res)[0], "ROUGEL": rouge.compute_score(gts, res)[0]}
    assert {name: float(ours[name]) for name in expected} == pytest.approx(expected, rel=CLOSE, abs=CLOSE)


@pytest.mark.filterwarnings("ignore")  # the package leaves its pipes open
def test_meteor_is_that_of_pycocoevalcap() -> None:
    program = pytest.importorskip("pycocoevalcap.meteor.meteor").Meteor()
    preds, references = corpus(50, 0)
    metric = METEOR()
    metric.update(preds, references)
    expected, _ = program.compute_score(*tokenised(preds, references))
    assert float(metric.compute()) == pytest.approx(expected, rel=CLOSE)


def official() -> Any:
    """Load the class of the official VQA evaluation."""
    try:
        files = importlib.metadata.files("salesforce-lavis") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("salesforce-lavis, which ships the official VQA evaluation, is not installed")
    file = next(file for file in files if file.name == "vqa_eval.py")
    spec = importlib.util.spec_from_file_location("vqa_eval", str(file.locate()))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VQAEval


def official_accuracy(judge: Any, pred: str, answers: list[str]) -> float:
    """Score as the evaluation's newest version does; the one that is shipped leaves people's number words and articles.

    Args:
        judge: Has the official ways of spelling answers.
        pred: The prediction.
        answers: Those of ten people.
    """
    given, *said = (text.replace("\n", " ").replace("\t", " ").strip() for text in (pred, *answers))
    if len(set(said)) > 1:
        given, *said = (judge.processDigitArticle(judge.processPunctuation(text)) for text in (given, *said))
    matches = [sum(other == given for at, other in enumerate(said) if at != one) for one in range(len(said))]
    return sum(min(1.0, count / 3) for count in matches) / len(said)


def answer_of(draw: random.Random) -> str:
    """A short answer, of which most are hard to read."""
    more = (
        "two",
        "TWO",
        "ten",
        "none",
        "a",
        "an",
        "the",
        "1,000",
        "1.5",
        "yes.",
        "it's",
        "its",
        "y'all",
        "5'10",
        "\n",
        "\t",
        "",
    )
    parts = (CONTRACTIONS, NUMBERS, SIGNS, LETTERS, ABBREVIATIONS, WORDS[:20], more)
    return draw.choice((" ", "", "-", ", ")).join(draw.choice(draw.choice(parts)) for _ in range(draw.randint(1, 3)))


@pytest.mark.filterwarnings("ignore")
def test_vqa_accuracy_is_that_of_the_official_evaluation() -> None:
    judge, draw = official()(SimpleNamespace(getQuesIds=list), None), random.Random(0)
    for _ in range(5000):
        said = [answer_of(draw) for _ in range(draw.randint(1, 3))]
        answers = [draw.choice(said) for _ in range(10)]
        pred = draw.choice([*said, answer_of(draw), said[0].upper(), f" {said[0]}. "])
        metric = VQAAccuracy()
        metric.update([pred], [answers])
        expected = official_accuracy(judge, pred, answers)
        assert float(metric.compute()) == pytest.approx(expected, abs=CLOSE), (pred, answers)


def test_anls_is_that_of_its_package() -> None:
    score = pytest.importorskip("anls").anls_score
    draw = random.Random(0)
    for _ in range(2000):
        answers = [answer_of(draw).strip() or "x" for _ in range(draw.randint(1, 3))]
        pred = draw.choice([*answers, answer_of(draw), answers[0][1:], answers[0].upper() + "s"])
        metric = ANLS()
        metric.update([pred], [answers])
        assert float(metric.compute()) == pytest.approx(score(pred, answers), abs=CLOSE), (pred, answers)
