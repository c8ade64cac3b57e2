"""Answers to visual questions, brought to one spelling as the official VQA v2 evaluation does (Goyal et al. 2017)."""

import re

# Each is also recognised without its apostrophe. The text is in lower case by then, so forms with a capital "I" are
# never met.
_WITH_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
    """

# With "'ve" behind it, each is recognised with either one of the two apostrophes missing, but not with both.
_BEFORE_HAVE = """
    couldn't hadn't he'd it'd mightn't she'd shouldn't somebody'd someone'd something'd there'd they'd we'd who'd
    wouldn't you'd
    """

_OTHER_SPELLINGS = {
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "somebody'd": "somebodyd",  # the official table has it this way round
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}

CONTRACTIONS = (
    {word.replace("'", ""): word for word in _WITH_APOSTROPHE.split()}
    | {word.replace("'", "") + "'ve": word + "'ve" for word in _BEFORE_HAVE.split()}
    | {word + "ve": word + "'ve" for word in _BEFORE_HAVE.split()}
    | _OTHER_SPELLINGS
)
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())}
ARTICLES = frozenset(("a", "an", "the"))

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the official code passes a flag where `re.sub` takes a count


def strip_answer(answer: str) -> str:
    """Remove line ends, tabs and outer space: all that is done to a question whose humans agree."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalise_answer(answer: str) -> str:
    """Return an answer in lower case with digits for number words, and without articles or punctuation.

    A punctuation mark vanishes where the answer has it next to a space anywhere, or has a comma within a number; else
    it becomes a space. Full stops vanish except before a digit; apostrophes and colons stay.

    Args:
        answer: As `strip_answer` returns it.

    Example:
        >>> normalise_answer("The two dogs, dont bark!"), normalise_answer("red/blue"), normalise_answer("1,000.5")
        ("2 dogs don't bark", 'red blue', '1000.5')
    """
    words = _PERIOD.sub("", _without_punctuation(answer), count=_MOST_PERIODS).lower().split()
    kept = [number for word in words if (number := NUMBERS.get(word, word)) not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word, word) for word in kept)


def _without_punctuation(answer: str) -> str:
    comma_in_number = _COMMA_IN_NUMBER.search(answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or comma_in_number else " ")
    return text
