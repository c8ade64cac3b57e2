import pytest

from moadapt_tasks.options import lettered, meant

OPTIONS = ["A man.", "On the  sofa", "blue", "C3PO"]


def test_lettered_gives_one_option_a_line() -> None:
    assert lettered(OPTIONS) == "A. A man.\nB. On the  sofa\nC. blue\nD. C3PO"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b\n", "B"),
        ("(B)", "B"),
        ("(b) on the sofa", "B"),
        ("B.", "B"),
        ("B. blue", "B"),  # the letter counts
        ("D: C3PO", "D"),
        ("C) it is", "C"),
        ("blue", "C"),
        (" Blue. ", "C"),
        ("on the sofa", "B"),
        ("a man", "A"),  # begins with a letter that is a word
        ("c3po", "D"),
        ("The answer is C.", "C"),
        ("answer: (d)", "D"),
        ("Option B is right", "B"),
        ("", ""),
        ("E", ""),
        ("(E) other", ""),
        ("a dog on the sofa", ""),
        ("The answer is E", ""),
        ("the answer is unclear", ""),
    ],
)
def test_meant_reads_what_models_write(text: str, letter: str) -> None:
    assert meant(text, OPTIONS) == letter
