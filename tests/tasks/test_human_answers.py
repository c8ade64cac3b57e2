import pytest

from moadapt_tasks.human_answers import most_common, taught


@pytest.mark.parametrize(
    ("answers", "named", "expected"),
    [
        (["cat", "dog", "dog"], None, "dog"),
        (["two", "2", "2", "three", "three"], None, "2"),  # three say 2 in some way
        (["two", "2"], "2", "2"),  # the file settles the spelling
        (["cat", "dog"], "dog", "dog"),  # and ties
        (["cat", "dog"], None, "cat"),
        (["cat", "dog", "dog"], "cat", "dog"),  # but not what most people say
    ],
)
def test_most_common_is_what_most_people_say(answers: list[str], named: str | None, expected: str) -> None:
    assert most_common(answers, named) == expected


def test_taught_is_the_most_common_answer_or_all() -> None:
    answers = ["cat", "dog", "dog"]
    assert taught(answers, "most_common") == ("dog",)
    assert taught(answers, "all") == ("cat", "dog", "dog")
