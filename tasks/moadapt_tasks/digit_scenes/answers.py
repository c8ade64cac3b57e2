"""What ten people say to a question with one right answer."""

import numpy as np

from moadapt_tasks.digit_scenes.questions import NUMBERS

_ANSWERS = 10
_OTHERWISE = 3
"""How many of the ten spell their answer in another way."""


def ten_answers(answer: str, rng: np.random.Generator) -> list[str]:
    """Return what ten people say: most of them the answer, some another spelling that counts as the same.

    Args:
        answer: The right answer.
        rng: Chooses spellings and people.
    """
    words = " ".join(NUMBERS[int(word)] if word.isdecimal() else word for word in answer.split())
    spellings = [words, words.capitalize(), f"{answer}.", *([f"a {answer}"] if " " in answer else [])]
    others = [str(other) for other in rng.choice([other for other in spellings if other != answer], size=_OTHERWISE)]
    answers = [answer] * (_ANSWERS - _OTHERWISE) + others
    return [answers[i] for i in rng.permutation(_ANSWERS)]
