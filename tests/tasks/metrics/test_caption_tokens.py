"""Captions are cut as the tokeniser of the public COCO caption evaluation cuts them.

The expected words of the tables are what that evaluation itself gives (`pycocoevalcap` 1.2 with its Java tokeniser),
each caption followed by one that starts with "A".
"""

import pytest

from moadapt_tasks.metrics.caption_tokens import caption_tokens, spaced_caption_tokens
from moadapt_tasks.metrics.penn_lexer import penn_tokens

CUT = {
    # contractions
    "A man doesn't move": "a man does n't move",
    "I can't, I won't, I DON'T": "i ca n't i wo n't i do n't",
    "don\u2019t": "do n't",
    "they shouldn't've": "they should n't 've",
    "we're, he'll, I'd've": "we 're he 'll i 'd 've",
    "cannot gonna wanna gimme 'tis": "can not gon na wan na gim me 't is",
    "dont": "dont",
    # possessives and other apostrophes
    "the dog's bowl": "the dog 's bowl",
    "the dogs' bowl": "the dogs bowl",
    "O'Brien's o'clock": "o'brien 's o'clock",
    "y'all rock 'n' roll": "y' all rock 'n' roll",
    "the '80s and the 1990's": "the '80s and the 1990 's",
    "a 'quoted' word": "a quoted word",
    # abbreviations
    "The U.S. flag": "the u.s. flag",
    "in the U.S.": "in the u.s.",
    "Mr. Smith of St. Louis vs. Inc. etc.": "mr. smith of st. louis vs. inc. etc.",
    "at 3 p.m. on Sat.": "at 3 p.m. on sat",
    "No. 5 or fig. 5, but no. and fig.": "no. 5 or fig. 5 but no and fig",
    "Miss. is a state, a miss. is none": "miss. is a state a miss is none",
    "plan B. The dog": "plan b the dog",
    "plan B. goes": "plan b. goes",
    "plan B.": "plan b",
    # hyphens and slashes
    "a well-known T-shirt": "a well-known t-shirt",
    "black-and-white": "black-and-white",
    "a - b -- c --- d \u2013 e \u2014 f": "a b c d e f",
    "a 2-year-old's non-U.S. toy": "a 2-year-old 's non-u.s. toy",
    "and/or w/o w/ a": "and/or w/o w / a",
    # numbers and money
    "3.5 or 1,000 or .5 or 10:30": "3.5 or 1,000 or .5 or 10:30",
    "1,2 and 3, 4": "1,2 and 3 4",
    "-5 +5 5-6": "-5 +5 5-6",
    "1/2 and ½ on 9/11/2001": "1/2 and 1/2 on 9/11/2001",
    "22 3/4 street": "22 3/4 street",
    "$5.00 £5 €5 5¢ 50% #1": "$ 5.00 # 5 $ 5 5 cents 50 % # 1",
    "10:30pm 10am 4x4 1st": "10:30 pm 10am 4x4 1st",
    "call 555-1234 or (555) 123-4567": "call 555-1234 or -lrb-555-rrb- 123-4567",
    "5'10\"": "5 10",
    # quotes, brackets and other signs
    '"Stop" sign': "stop sign",
    "\u201cStop\u201d \u00absign\u00bb \u2018now\u2019": "stop sign now",
    "a (small) dog": "a -lrb- small -rrb- dog",
    "[a] {b}": "-lsb- a -rsb- -lcb- b -rcb-",
    "wait... what?! yes!! no; a: b…": "wait what ?! yes !! no a b",
    "well ... then": "well then",
    "salt & pepper, R&B, AT&T": "salt & pepper r&b at&t",
    "&lt;b&gt; &amp; &quot;q&quot;": "< b > & q",
    "smile :) or ;-D": "smile :-rrb- or ;-d",
    "a * b ** c_d": "a * b ** c_d",
    # addresses
    "www.foo.com/ab and me@foo.com": "www.foo.com/ab and me@foo.com",
    "@me #tag http://a.com/b?c=d.": "@me #tag http://a.com/b?c=d",
    "photo.jpg, 1.jpg": "photo.jpg 1.jpg",
    # other scripts and signs
    "café NAÏVE Zürich's": "café naïve zürich 's",
    "a dog 😀 runs": "a dog runs",
    "日本 नमस्ते": "日本 नमस्ते",
    "20° ©2": "20 ° © 2",
}


@pytest.mark.parametrize(("text", "words"), CUT.items(), ids=CUT)
def test_caption_tokens_cuts_as_the_public_evaluation(text: str, words: str) -> None:
    assert caption_tokens(text) == words.split()


@pytest.mark.parametrize("text", ["", "   ", ".", "-- ...", '"!"', "\n"])
def test_caption_without_words_has_no_tokens(text: str) -> None:
    assert caption_tokens(text) == []


@pytest.mark.parametrize("end", ["\n", "\r\n", "\u2028", " ", "\t", "\u00a0"])
def test_line_ends_count_as_spaces(end: str) -> None:
    assert caption_tokens(f"a dog{end}runs{end}") == ["a", "dog", "runs"]


def test_number_with_a_space_is_one_token_for_rouge_and_two_for_the_others() -> None:
    assert spaced_caption_tokens("22 3/4 St.") == ["22\u00a03/4", "st."]
    assert caption_tokens("22 3/4 St.") == ["22", "3/4", "st."]


PUNCTUATED = {
    '"No," he said -- twice.': "`` no , '' he said -- twice .",
    "&QUOT;a&QUOT; b&NBSP;c": "&quot; a &quot; b c",  # in capitals they stay, but spaces
    "caf&eacute; &Uuml;ber-x &#39;s &#x27; &copy;": "caf&eacute; &uuml;ber - x &#39; s & #x 27 ; & copy ;",
    "AT&AMP;T R&amp;B": "at&t r&b",
    "do\u00adn't soft\u00adhyphen'train": "do n't softhyphe n'train",
    '"$5" "\u00e9t\u00e9" &quot;a&quot; ""': "`` $ 5 '' '' \u00e9t\u00e9 '' `` a '' '' ''",
    "'cause 'tis a 'quoted' word": "'cause 't is a ` quoted ' word",
    "\u201bleft\u2019": "` left '",
    # Where an abbreviation ends a sentence, its full stop is a token of its own too.
    "in the U.S.": "in the u.s. .",
    "the U.S. The dog": "the u.s. . the dog",
    "the U.S. Two dogs": "the u.s. two dogs",
    "the U.S. THE dog": "the u.s. . the dog",
    "the non-U.S. The dog": "the non-u.s. . the dog",
    "the U.S.-U.K": "the u.s.-u.k",
    "Mass. Two": "mass. . two",
    "Mass. \u00c9mile": "mass. . \u00e9mile",
    "Mass. two": "mass. two",
    "etc. <b>": "etc. . <b>",
    "Co. Ltd. Co. Two": "co. ltd. . co. . two",
    "Mr. Two": "mr. two",
    "plan B. The dog": "plan b . the dog",
    "plan B. THE dog": "plan b . the dog",
    "plan B. Two dogs": "plan b. two dogs",
    # letters that only look like ASCII ones where case does not count
    "\u0130.x. and \u0131/x": "i\u0307.x . and \u0131 / x",
    "do\u017fn't, dog'\u017f": "do\u017fn ` t , dog ' \u017f",
    # words may hold combining marks and soft hyphens, compounds may not
    "e\u0301a e\u0301-b a\u00adb_c": "e\u0301a e\u0301 - b ab _ c",
    "x \u00ad y": "x - y",
    "x\u207f x\u00b2": "x\u207f x \u00b2",
    "x.py-approx., vd:Od!": "x.py-approx. , vd : od !",
    "a\u060c b\u061f": "a \u060c b \u061f",
}


@pytest.mark.parametrize(("text", "tokens"), PUNCTUATED.items(), ids=PUNCTUATED)
def test_penn_tokens_keeps_punctuation(text: str, tokens: str) -> None:
    assert penn_tokens(text) == tokens.split(" ")


def test_every_plain_word_is_its_own_token() -> None:
    """Words in letters alone take a shorter way through the lexer; a comma behind them sends them the long way."""
    words = ["cannot", "Gonna", "wanna", "gotta", "lemme", "gimme", "cannots", "gonnabe", "Dog", "ZEBRA", "a", "I"]
    for word in words:
        assert caption_tokens(f"{word} x") == [*caption_tokens(f"{word}, "), "x"]
