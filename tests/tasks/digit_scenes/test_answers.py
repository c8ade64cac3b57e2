import numpy as np
import pytest

from moadapt_tasks.digit_scenes.answers import ten_answers
from moadapt_tasks.digit_scenes.questions import NUMBERS
from moadapt_tasks.digit_scenes.scenes import COLORS
from moadapt_tasks.metrics.vqa_answers import normalise_answer


@pytest.mark.parametrize(
    "answer",
    [*"0123456789", *COLORS, "yes", "no", "nothing", *(f"{color} {digit}" for color in COLORS for digit in "08")],
)
def test_ten_answers_are_spellings_of_one(answer: str) -> None:
    for seed in range(10):
        answers = ten_answers(answer, np.random.default_rng(seed))
        assert len(answers) == 10
        assert answers.count(answer) == 7
        assert {normalise_answer(text) for text in answers} == {normalise_answer(answer)}


def test_ten_answers_write_numbers_out_at_times() -> None:
    answers = {text for seed in range(20) for text in ten_answers("3", np.random.default_rng(seed))}
    assert answers == {"3", NUMBERS[3], NUMBERS[3].capitalize(), "3."}
