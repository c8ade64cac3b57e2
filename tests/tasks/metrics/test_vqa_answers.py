"""Answers are spelled as the official VQA v2 evaluation spells them."""

import pytest

from moadapt_tasks.metrics.vqa_answers import CONTRACTIONS, normalise_answer, strip_answer


@pytest.mark.parametrize(
    ("answer", "spelled"),
    [
        ("YES", "yes"),
        ("Yes.", "yes"),
        ("yes!", "yes"),
        ("The  Red   Bus", "red bus"),
        ("a", ""),
        ("an apple and the pear", "apple and pear"),
        ("A-frame", "frame"),
        ("None", "0"),
        ("zero one two three four five six seven eight nine ten", "0 1 2 3 4 5 6 7 8 9 10"),
        ("eleven", "eleven"),
        ("one-way", "1 way"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("DONT", "don't"),
        ("couldnt've couldn'tve couldntve", "couldn't've couldn't've couldntve"),
        ("somebody'd oclock twas yall", "somebodyd o'clock 'twas y'all"),
        ("id Im wed shed", "id im wed shed"),
    ],
)
def test_words_are_spelled_in_one_way(answer: str, spelled: str) -> None:
    assert normalise_answer(answer) == spelled


@pytest.mark.parametrize(
    ("answer", "spelled"),
    [
        # A mark becomes a space, unless it stands beside one somewhere in the answer.
        ("red/blue", "red blue"),
        ("red/ blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("t-shirt - red", "tshirt red"),
        ("(left)", "left"),
        ('"stop"', "stop"),
        ("salt,pepper", "salt pepper"),
        ("salt, pepper,oil", "salt pepperoil"),
        ("salt ,pepper,oil", "salt pepperoil"),
        # A comma in a number makes every mark vanish.
        ("1,000", "1000"),
        ("1,000/day", "1000day"),
        ("1,x", "1 x"),
        # A full stop vanishes except before a digit; other signs stay.
        ("3.5", "3.5"),
        ("$3.50.", "$3.50"),
        (".5", ".5"),
        ("u.s.a", "usa"),
        ("v.2", "v.2"),
        ("5.a", "5a"),
        ("10:30", "10:30"),
        ("dog's", "dog's"),
        ("50% & #1", "50% & #1"),
    ],
)
def test_punctuation_goes_by_its_neighbours(answer: str, spelled: str) -> None:
    assert normalise_answer(answer) == spelled


def test_only_the_first_32_full_stops_vanish() -> None:
    assert normalise_answer("x." * 40) == "x" * 33 + ".x" * 7 + "."


def test_line_ends_and_tabs_are_spaces_and_outer_space_goes() -> None:
    assert strip_answer("\n a\nred\tbus \n") == "a red bus"


def test_contractions_differ_from_their_keys_in_apostrophes_only() -> None:
    for key, spelled in CONTRACTIONS.items():
        assert key != spelled
        assert key.replace("'", "") == spelled.replace("'", "")
