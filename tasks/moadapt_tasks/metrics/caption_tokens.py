"""Captions as the words that BLEU, ROUGE-L and CIDEr-D count: tokenised, in lower case, without punctuation.

The public COCO caption evaluation tokenises all captions as one text, where the next caption's first word can decide
whether the full stop of a final "plan B." is kept ("plan b." before "two dogs", "plan b" before "A dog"). Here each
caption is read on its own, and its end ends a sentence: "plan b".
"""

from moadapt_tasks.metrics.penn_lexer import penn_tokens

# Brackets are not among them: the public evaluation lists them in capitals and looks for them after lower-casing, so
# "-lrb-" and "-rrb-" stay in its captions, and so they do here.
PUNCTUATION = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))


def caption_tokens(text: str) -> list[str]:
    r"""Return a caption's words, as BLEU and CIDEr-D count them.

    Args:
        text: A caption; line ends count as spaces.

    Example:
        >>> caption_tokens("A man, 5'10\" tall, can't reach the U.S. flag!")
        ['a', 'man', '5', '10', 'tall', 'ca', "n't", 'reach', 'the', 'u.s.', 'flag']
    """
    return [word for token in spaced_caption_tokens(text) for word in token.split()]


def spaced_caption_tokens(text: str) -> list[str]:
    r"""Return a caption's words as ROUGE-L counts them: a number written with a space is one word.

    The public evaluation has the two readings: its tokeniser puts a no-break space into "22 3/4" and "555 1234", at
    which its ROUGE-L does not split and its BLEU and CIDEr-D do.

    Args:
        text: A caption; line ends count as spaces.

    Example:
        >>> spaced_caption_tokens("22 3/4 miles"), caption_tokens("22 3/4 miles")
        (['22\xa03/4', 'miles'], ['22', '3/4', 'miles'])
    """
    return [token for token in penn_tokens(text) if token not in PUNCTUATION]
