"""English text cut into the tokens of the Penn Treebank, as the tokeniser of the public COCO evaluation cuts it.

That tokeniser is Stanford's `PTBTokenizer` of 2014 (CoreNLP 3.4.1) with the options `-preserveLines -lowerCase`. It is
a lexer in the classical sense: at each place of the text the rule that reaches furthest wins, of equals the first one.
"""

import re

from moadapt_tasks.metrics.penn_rules import RULES

# Most of a caption is plain words before a space, which no rule reaches beyond; they skip the search through the rules.
_PLAIN_WORD = re.compile(r"(?!(?:cannot|gonna|wanna|gotta|lemme|gimme)\b)[a-z]+(?=[ \n])", re.IGNORECASE)
# Letters that Python takes for "i", "s" and "k" where case does not count, and what stands in for them in patterns.
_UNLIKE_ASCII = str.maketrans("\u0130\u0131\u017f\u212a", "\u00c0\u00df\u00df\u00c0")
_SPACES = re.compile(r"[\r\n\v\f\u2028\u2029]|(?i:&nbsp;)")


def penn_tokens(text: str) -> list[str]:
    r"""Cut a text into Penn Treebank tokens in lower case, punctuation included.

    Line ends count as spaces. Signs that the tokeniser does not know (emoji among them) separate tokens and vanish. A
    token may hold a no-break space: "1 1/2" is the one token "1\xa01/2".

    Args:
        text: A caption or another short English text.

    Example:
        >>> penn_tokens("The dog's bowl (it isn't full).")
        ['the', 'dog', "'s", 'bowl', '-lrb-', 'it', 'is', "n't", 'full', '-rrb-', '.']
    """
    line = _SPACES.sub(" ", text).replace("&apos;", "'") + "\n"
    matched = line.translate(_UNLIKE_ASCII)
    tokens: list[str] = []
    place = 0
    while place < len(line):
        place, token = _token_at(line, matched, place)
        if token:
            tokens.append(token.replace(" ", "\u00a0").lower())
    return tokens


def _token_at(line: str, matched: str, place: int) -> tuple[int, str]:
    """Return where the token at a place ends and how it is written, the empty text if nothing is."""
    plain = _PLAIN_WORD.match(matched, place)
    if plain is not None:
        return plain.end(), line[place : plain.end()]
    furthest, end, token = place, place + 1, ""
    for rule in RULES:
        found = rule.pattern.match(matched, place)
        if found is not None and found.end() > furthest:
            furthest = found.end()
            end = found.end(found.lastindex or 0)
            token = rule.write(line[place:end])
    return end, token
