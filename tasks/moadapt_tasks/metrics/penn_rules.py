"""The rules of the caption tokeniser: patterns of tokens, and how each token is written.

A rule that has a group takes only the group as its token; what stands outside it is context that must be there. The
lexer picks the rule whose match, context included, reaches furthest, and of equals the one that stands first here.
Python's `|` takes the first alternative that fits, not the longest, so the alternatives of one rule must not begin one
another unless the longer stands first; the rest are rules of their own.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from moadapt_tasks.metrics.penn_words import (
    BEFORE_NUMBER,
    FILE_ENDINGS,
    PLACE_TIME_COMPANY,
    SENTENCE_OPENERS,
    TITLE_AND_NAME,
)


class Rule(NamedTuple):
    """One kind of token: what it looks like in its context, and how its text is written in the output."""

    pattern: re.Pattern[str]
    write: Callable[[str], str]


def _rule(pattern: str, write: Callable[[str], str] = str) -> Rule:
    return Rule(re.compile(pattern, re.IGNORECASE), write)


def _as(text: str) -> Callable[[str], str]:
    return lambda _: text


def _marks(quotes: str) -> Callable[[str], str]:
    """Write quotation marks, but those that are entities in capitals, which stay."""
    return lambda token: quotes if token in ('"', "&quot;") else token


def _spelling(table: dict[str, str]) -> Callable[[str], str]:
    characters = str.maketrans(table)
    return lambda token: token.translate(characters)


def _hyphens(token: str) -> str:
    """Write a word without its soft hyphens; without anything else, they are one hyphen."""
    return token.replace("\u00ad", "") or "-"


def _with_full_stop(token: str) -> str:
    """Write an abbreviation at a sentence's end, whose full stop is a token of its own too."""
    return token + "."


_parentheses = _spelling({"(": "-lrb-", ")": "-rrb-"})
_brackets = _spelling({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"})
_quotes = _spelling(
    dict.fromkeys("\u2018\u201b\u2039\u0091", "`")
    | dict.fromkeys("\u2019\u203a\u0092", "'")
    | dict.fromkeys("\u201c\u00ab\u0093", "``")
    | dict.fromkeys("\u201d\u00bb\u0094", "''")
)
_money = _spelling({"\u00a2": "cents", "\u00a3": "#", "\u00a4": "$", "\u0080": "$", "\u20a0": "$", "\u20ac": "$"})
_fractions = _spelling({"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"})

# `\w` holds superscripts, fractions and circled numbers too, which are no letters; combining marks it lacks.
MARKS = (
    r"\u00ad\u02c2-\u02c5\u02d2-\u02df\u02e5-\u036f\u0375\u03f6\u0615-\u061a\u064b-\u065e\u0670"
    r"\u0900-\u0903\u093c-\u094d\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u2183\u2184"
)
NUMERALS = (
    r"\u00b2\u00b3\u00b9\u00bc-\u00be\u2070\u2072-\u207e\u2080-\u208f\u2150-\u2182\u2185-\u218b\u2460-\u24ff"
    r"\u2776-\u2793\u3007\u3021-\u3029\u3192-\u3195\u3220-\u3229\u3248-\u325f\u3280-\u3289\u32b1-\u32bf"
)
ACCENTED = r"&[aeiou](?:acute|grave|uml);"
LETTER = rf"(?:[^\W\d_{NUMERALS}]|[{MARKS}]|{ACCENTED})"
SIGN = rf"(?:[^\W_{NUMERALS}]|[{MARKS}]|{ACCENTED})"  # a letter or a digit
SPACE = r"[ \t\u00a0\u2000-\u200a\u3000]"
BREAK = r"[ \t\n\u00a0\u2000-\u200a\u3000]"
APOSTROPHE = r"['\u0092\u2019]"
TICK = r"['`\u0091\u0092\u2018\u2019\u201b]"
WORD = rf"{LETTER}{SIGN}*(?:[.!?]{LETTER}{SIGN}*)*"
CLITIC = rf"{APOSTROPHE}(?:[msd]|re|ve|ll)"
INITIALS = r"[a-z](?:\.[a-z])+"
ACRONYM = rf"(?:(?:canada|sino|korean|eu|japan|non)-u\.s|u\.s\.-u\.(?:s\.s\.r|k)|{INITIALS})"
PLAIN_SIGN = rf"[^\W_{NUMERALS}]"  # compounds end at combining marks, words do not
PART = rf"(?:[dol]{TICK}{PLAIN_SIGN})?{PLAIN_SIGN}+"
COMPOUND = rf"{PART}(?:[-_\u058a\u2010\u2011]{PART})*"
HYPHENED = rf"[a-z0-9][a-z0-9.,\u00ad]*(?:-(?:{INITIALS}\.|[a-z0-9\u00ad]+))+"
NAME = r"[a-z][a-z0-9_:.-]*"
ATTRIBUTE = rf" +{NAME}(?: *= *(?:'[^'\r\n]*'|\"[^\"\r\n]*\"|{NAME}))?"
URL_SIGN = r"[^ \t\n\f\r\"<>|(){}]"
URL_END = r"[^ \t\n\f\r\"<>|.!?(){},-]"
WEB_HOST = r"www\.(?:[^ \t\n\f\r\"<>|.!?(){},]+\.)+[a-z]{2,4}"
DOMAIN = r"(?-i:[^ \t\n\f\r\"`'<>|.!?(){},-_$])+\."  # no digit and no capital: `,-_` is a range that holds them
MAIL_SIGN = r"[^ \t\n\f\r\"<>|(){}\u00a0]"
MAIL_HOST = r"[^ \t\n\f\r\"<>|(){}.\u00a0]+"
AREA_CODE = r"(?:\(\d{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:\d{2,4}[- \u00a0])?\d{2,4}[- \u00a0])"
SLASHED = r"[a-z0-9]+(?:-[a-z]+){0,2}"
LOW_QUOTE = "[\u201a\u201e]"
MARKUP = rf"<(?:[!?][a-z-][^>\r\n]*|{NAME}(?:{ATTRIBUTE})* */?|/{NAME}) *>"
CAPITAL = "(?-i:[" + "".join(filter(str.isupper, map(chr, range(0x2500)))) + "])"
# What ends a sentence before it: the end of the text, markup, or a word that is likely to open one.
BEFORE_CAPITAL = rf"(?:{SPACE}+(?:{CAPITAL}|{MARKUP})|{SPACE}*\n)"
BEFORE_OPENER = rf"(?:{SPACE}+(?:(?-i:(?=[A-Z])){SENTENCE_OPENERS}{BREAK}|{MARKUP})|{SPACE}*\n)"

RULES = (
    # Words and their clitics. The parts of "cannot" and "gonna" are two tokens: the first here, the rest as a word.
    _rule(r"(can)not|(gon|wan)na|(got)ta|(lem|gim)me"),
    _rule(rf"({APOSTROPHE}t)(?:is|was)"),
    _rule(MARKUP),
    _rule(r"[\u0096\u0097\u2013-\u2015]|&(?:md|mdash|ndash);", _as("--")),
    _rule(r"&amp;", _as("&")),
    _rule(r"&(?:ht|tl|ur|lr|qc|ql|qr|odq|cdq|#\d+);"),
    _rule(rf"({WORD}){CLITIC}", _hyphens),
    _rule(rf"([a-z\u00ad]*(?!n)[a-z]\u00ad*)n{TICK}t", _hyphens),
    _rule(WORD, _hyphens),
    _rule(rf"{APOSTROPHE}n{APOSTROPHE}?"),
    _rule(rf"(?:[ldj]|dunkin|somethin|ol){APOSTROPHE}"),
    _rule(rf"{APOSTROPHE}(?:em|till?|cause|[2-9]0s)"),
    _rule(rf"(?-i:[A-HJ-XZn]){TICK}{LETTER}{{2,}}|o{TICK}o"),
    _rule(rf"{LETTER}+[aeiouy]{TICK}(?-i:[aeiouA-Z]){LETTER}*"),
    _rule(r"cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l"),
    _rule(rf"(y{APOSTROPHE}){LETTER}"),
    # Addresses.
    _rule(rf"https?://{URL_SIGN}+{URL_END}"),
    _rule(WEB_HOST),
    _rule(rf"{WEB_HOST}/{URL_SIGN}+{URL_END}"),
    _rule(rf"(?:{DOMAIN})+(?:com|net|org|edu)(?:/{URL_SIGN}+{URL_END})?"),
    _rule(rf"(?:&lt;|<)?[a-z0-9]{MAIL_SIGN}*@(?:{MAIL_HOST}\.)*{MAIL_HOST}(?:&gt;|>)?"),
    _rule(rf"@[a-z_][a-z_0-9]*|#{LETTER}+"),
    _rule(rf"({CLITIC})[^a-z]", _quotes),
    _rule(rf"(n{TICK}t)[^a-z]", _quotes),
    # Numbers.
    _rule(r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}"),
    _rule(r"[-+]?(?:\d*(?:[.:,\u00ad\u066b\u066c]\d+)+|\d+)", _hyphens),
    _rule(r"(?:\d{1,4}[- \u00a0])?\d{1,4}(?:\\?/|\u2044)\d{1,4}"),
    _rule(r"[\u00bc-\u00be\u2153-\u215e]", _fractions),
    _rule(r"-(?:rrb|lrb|rcb|lcb|rsb|lsb)-|c\.d\.s|pro-|anti-|s(?:&|&amp;)(?:p-500|ls)|cap'n|c'est"),
    _rule(rf"{SLASHED}(?:\\?/{SLASHED}){{1,2}}"),
    _rule(r"(?-i:[A-Z]*)\$|#"),
    _rule(r"[\u0080\u00a2-\u00a5\u20a0\u20ac\u060b\u0e3f\u20a4\uffe0\uffe1\uffe5\uffe6]", _money),
    # Abbreviations.
    _rule(rf"([a-z])\.{BEFORE_OPENER}"),
    _rule(rf"({ACRONYM})\.{BEFORE_OPENER}", _with_full_stop),
    _rule(rf"(co\.){SPACE}ltd"),
    _rule(rf"({PLACE_TIME_COMPANY})\.{BEFORE_CAPITAL}", _with_full_stop),
    _rule(rf"({PLACE_TIME_COMPANY}\.)[\s\S]{{2}}"),
    _rule(rf"(?:{PLACE_TIME_COMPANY}|{TITLE_AND_NAME}|{ACRONYM}|[a-z])\."),
    _rule(ACRONYM),
    _rule(r"c\+\+|[cf]#"),
    _rule(rf"({BEFORE_NUMBER}\.){BREAK}?\d"),
    _rule(rf"({APOSTROPHE}\d\d){BREAK}"),
    _rule(rf"({SIGN}+(?:\.{SIGN}+)*\.{FILE_ENDINGS})(?:{BREAK}|[.?!,])"),
    _rule(rf"((?:{WORD}|{COMPOUND})\.)[,;:\u3001]", _hyphens),
    _rule(rf"({HYPHENED}\.)[,;:\u3001]", _hyphens),
    _rule(rf"{AREA_CODE}\d{{3,4}}[- \u00a0]?\d{{3,5}}", _parentheses),
    _rule(r"(?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}"),
    # Signs.
    _rule(r"(\"|&quot;)[a-z0-9$]", _marks("``")),
    _rule(r"\"|&quot;", _marks("''")),
    _rule(r"([<>]?[:;=](?-i:[-o*'])?(?-i:[()DPdpO\\{@|\[\]]))[^a-z0-9]", _parentheses),
    _rule(r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)", _parentheses),
    _rule(r"[(){}\[\]]", _brackets),
    _rule(r"&lt;", _as("<")),
    _rule(r"&gt;", _as(">")),
    _rule(r"-{3,4}", _as("--")),
    _rule(r"-+"),
    _rule(r"\.{3,5}|(?:\.[ \u00a0]){2,4}\.|[\u0085\u2026]", _as("...")),
    _rule(r"@+|#+|_+|\*+|(?:\\\*){1,3}"),
    _rule(
        rf"[,;:\u3001]|[?!]+|[.\u00a1\u00bf\u3002\u037e\u0387\u0589\u0600-\u0603\u0606-\u060a\u060c\u0614\u061b\u061e\u061f\u066a\u066d\u06d4]|=|/|{LOW_QUOTE}"
    ),
    # Compounds.
    _rule(HYPHENED, _hyphens),
    _rule(COMPOUND, _hyphens),
    _rule(
        r"(?-i:[A-Z]+(?:(?:&(?i:amp);|[+&])[A-Z]+)+)", lambda token: re.sub("&amp;", "&", token, flags=re.IGNORECASE)
    ),
    _rule(rf"[`\u0091-\u0094\u2018\u2019\u201b-\u201d\u201f\u2039\u203a\u00ab\u00bb]{{1,2}}|''|{APOSTROPHE}", _quotes),
    _rule(r"(')[a-z][^ \t\n\r\u00a0]", _as("`")),
    _rule(r"<<|>>"),
    _rule(
        r"[<>+%&~^|\\\u00a6-\u00a9\u00ac\u00ae-\u00ba\u00d7\u00f7\u2016\u2017\u2020-\u2023\u2030-\u2038\u203b"
        r"\u203e-\u2042\u2044\u2070\u2074-\u207e\u2080-\u208e\u2100-\u214f\u2190-\u2bff\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff65]"
    ),
    _rule(CLITIC, _quotes),
)
