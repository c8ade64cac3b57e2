"""Generated English for comparisons: captions with trouble for tokenisers in them, glued words, noise, scripts."""

import random
from collections.abc import Callable

WORDS = (
    "a the man woman dog cat red bus street table two three playing looking at on in with is are of and near old young "
    "plate food pizza train sign clock tower field grass water horse umbrella kitchen their his her for big small white"
).split()
CONTRACTIONS = (
    "don't can't won't isn't shouldn't've I'd've they're we'll it's y'all 'tis 'twas o'clock ma'am cannot gonna wanna "
    "gotta lemme gimme dont DON'T don\u2019t it\u2019s ain't let's who's 'cause 'em 'til nothin' ol' d'oh O'Brien l'eau "
    "c'mon s'mores cap'n jack-o'-lantern rock'n'roll 'n' dog's dogs' James' 1990's '80s 90's US's it's' don\u201bt"
).split()
ABBREVIATIONS = (
    "Mr. Mrs. Dr. St. Ave. Blvd. U.S. U.K. U.S.A. D.C. a.m. p.m. A.M. vs. etc. e.g. i.e. Inc. Co. Ltd. Corp. Jr. Sr. "
    "Ph.D. No. no. fig. Fig. Jan. Sept. Mon. Sat. J. B. J.R. Gen. Lt. approx. ft. in. oz. lbs. mph. Calif. Mass. Miss. "
    "Tex. op. pp. art. ca. cf. al. ed. Mt. Ft. Dept. Bros. Rd. Sgt. pt. x. km. tel. non-U.S. U.S.-U.K. The Two A"
).split()
NUMBERS = [
    *"5 3.5 1,000 1,000,000.50 .5 10:30 10:30pm 10am 4x4 1st 33rd 5-6 -5 +5 1/2 9/11/2001 12-25-1999 2015-01-01".split(),
    *"555-1234 555-123-4567 1-800-555-1234 555.123.4567 $5.00 \u00a35 \u20ac5 5\u00a2 50% #1 \u00bd 1\u00bd 20\u00b0C".split(),
    *"3.14.15 5'10\" 6' 1,2 10,00 US$5 A$5 2-year-old 18-wheeler 737-800 3D mid-1900s 7/11 5/8\" 1. m\u00b2".split(),
    *["22 3/4", "(555) 123-4567", "1 1/2", "+1 555 555 1234"],
]
COMPOUNDS = (
    "well-known black-and-white T-shirt x-ray pre-1950 co-op hi-fi -- --- - \u2013 \u2014 a-b-c e-mail U-Haul 7-Eleven X- -ish "
    "pro-life and/or w/o w/ his/her red/blue km/h a/b/c n/a TV/DVD / // black/white/red I/O a_b __ soft\u00adhyphen"
).split()
ADDRESSES = (
    "www.foo.com http://a.com/b?c=d https://foo.org/x.html me@foo.com foo.com flickr.com/photos photo.jpg img_001.png "
    "file.PDF x.py @me #tag #dog1 @user_name www.x.co.uk <b> </b> <br/> <a href='x'> &amp; &lt; &gt; &quot; &nbsp;"
).split()
SIGNS = (
    "& * ** = + < > << ~ ^ | \\ [a] {b} (c) R&B AT&T M&M's S&P ;) :) :-( :D ;-D <3 ^_^ C++ F# ... .. .... \u2026 ?! !! ??? "
    ", ; : . ! ? \" ' `` '' ` \u201c \u201d \u2018 \u2019 \u00ab \u00bb \u2122 \u00ae \u00a9 \u2192 \u00d7 \u00f7 \u00b1 \u00b2 \u2103 \u00bf \u00a1 \u2764 \u2605"
).split()
LETTERS = (
    "caf\u00e9 na\u00efve Z\u00fcrich \u65e5\u672c \u0928\u092e\u0938\u094d\u0924\u0947 \u041c\u043e\u0441\u043a\u0432\u0430 \u0645\u0631\u062d\u0628\u0627 \ud55c\uad6d "
    "\u00df \u0131 \u0130 e\u0301 \ufb01sh \u1e9e \u2160 \u00aa \u20b9 \u00a5 \U0001f600"
).split()
FRAGMENTS = (CONTRACTIONS, ABBREVIATIONS, NUMBERS, COMPOUNDS, ADDRESSES, SIGNS, LETTERS)
GLUE = " ", " ", "-", ".", "'", "/", ",", "&", "_", "", " . "
OPENING = '"', "(", "[", "'", "`", "\u201c", "\u2018"
CLOSING = ",", ".", "!", "?", ";", ":", '"', ")", "'", "...", "\u201d", "\u2019", "-", "/", "'s"
ASCII = [chr(code) for code in range(33, 127)]
RANGES = (
    (0x80, 0x250),
    (0x370, 0x600),
    (0x600, 0x700),
    (0x900, 0xA00),
    (0x2000, 0x2200),
    (0x2460, 0x2500),
    (0x3000, 0x3100),
)
LINE_ENDS = {0x85, 0x2028, 0x2029}  # the Java program takes them for the end of a text
BEYOND_ASCII = [chr(code) for start, end in RANGES for code in range(start, end) if code not in LINE_ENDS]

Draw = Callable[[random.Random], str]


def plain(draw: random.Random) -> str:
    """A caption of which every tenth word is a fragment that is hard to cut."""
    return _caption(draw, 0.1)


def nasty(draw: random.Random) -> str:
    """A caption of which every third word is."""
    return _caption(draw, 0.35)


def glued(draw: random.Random) -> str:
    """Words and fragments with signs between them instead of spaces."""
    return "".join(_fragment(draw, 0.5) + draw.choice(GLUE) for _ in range(draw.randint(2, 8)))


def noise(draw: random.Random) -> str:
    """Characters of ASCII one after another."""
    return _characters(draw, 0.5, ASCII)


def scripts(draw: random.Random) -> str:
    """Characters of other scripts between letters, spaces and full stops."""
    return _characters(draw, 0.3, BEYOND_ASCII)


KINDS: dict[str, tuple[Draw, int]] = {
    "plain": (plain, 3000),
    "nasty": (nasty, 3000),
    "glued": (glued, 2000),
    "noise": (noise, 1000),
    "scripts": (scripts, 1000),
}
"""What each kind is drawn by, and its part of 10,000 texts."""


def texts(kind: str, count: int, seed: int = 0) -> list[str]:
    """Draw texts of one kind."""
    draw = random.Random(f"{kind} {seed}")
    return [KINDS[kind][0](draw) for _ in range(count)]


def corpus(images: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """Draw a prediction and one to four references an image; predictions share words with them, some are empty."""
    draw = random.Random(f"corpus {seed}")
    preds, references = [], []
    for _ in range(images):
        said = [draw.choice((plain, nasty, glued))(draw) for _ in range(draw.randint(1, 4))]
        words = draw.choice(said).split(" ")
        kept = [word for word in words if draw.random() < 0.8] + draw.choices(WORDS, k=draw.randrange(3))
        preds.append("" if draw.random() < 0.05 else " ".join(kept))
        references.append(said)
    return preds, references


def _caption(draw: random.Random, rate: float) -> str:
    words = []
    for _ in range(draw.randint(3, 14)):
        before = draw.choice(OPENING) if draw.random() < 0.08 else ""
        behind = draw.choice(CLOSING) if draw.random() < 0.12 else ""
        words.append(before + _fragment(draw, rate) + behind)
    return " ".join(words) + draw.choice((".", ".", ".", "", "!", "...", '."', " ."))


def _fragment(draw: random.Random, rate: float) -> str:
    text = draw.choice(draw.choice(FRAGMENTS) if draw.random() < rate else WORDS)
    return draw.choice((text, text, text, text, text.capitalize(), text.upper())) if draw.random() < 0.5 else text


def _characters(draw: random.Random, rate: float, others: list[str]) -> str:
    count = draw.randint(1, 30)
    return "".join(draw.choice(others if draw.random() < rate else "abcDE 12 .'-, ") for _ in range(count))
