"""The words that the digit-scene tokenizer keeps whole.

Byte-level BPE can spell any text; these words are only spelled shorter. They cover plain questions, descriptions and
directions about pictures, and appear in pre-training as bare words to repeat, so that no embedding stays untrained.
"""

import numpy as np

_TEXT = """
    a above all also an and any are arrow as at background below beside big black blue bottom bottommost brown by
    can caption center choose circle color colored colors contains corner count dark describe digit digits does down
    each far find first four from furthest give gray green handwritten has have how image in is it its large largest
    last left leftmost light locate look lower many middle most near nearest next no none not nothing number numbers
    object objects of on one only orange other over pair photo picture pink purple question answer red rectangle
    right rightmost say scene see shape shapes short show shown shows side single small smallest some square tell
    than that the them there these this three to top topmost triangle two under up upper us we what where which
    white with word write yellow yes you zero box list order words
"""
WORDS = _TEXT.split()
MARKS = list(".,;:?!-'()[]")


def some_words(rng: np.random.Generator) -> list[str]:
    """Draw five to fourteen words, digits and marks."""
    pool = [*WORDS, *WORDS, *MARKS, *"0123456789", *(word.capitalize() for word in WORDS)]
    return [str(word) for word in rng.choice(pool, size=rng.integers(5, 15))]
