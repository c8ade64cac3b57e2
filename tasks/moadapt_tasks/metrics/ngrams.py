"""n-grams of a caption, counted."""

from collections import Counter
from collections.abc import Sequence

Ngram = tuple[str, ...]


def ngram_counts(tokens: Sequence[str], longest: int) -> Counter[Ngram]:
    """Count every run of 1 to `longest` tokens.

    Args:
        tokens: Words in order.
        longest: Length of the longest n-gram, at least 1.

    Example:
        >>> ngram_counts(["a", "red", "red"], longest=2)[("red",)]
        2
    """
    return Counter(
        tuple(tokens[start : start + length])
        for length in range(1, longest + 1)
        for start in range(len(tokens) - length + 1)
    )
