"""Our caption tokeniser beside the Java one that `pycocoevalcap` ships: where do they cut differently, and why?

    python tests/parity/java_tokens.py                   # 10,000 generated texts
    python tests/parity/java_tokens.py captions.txt ...  # texts of your own, one a line

Needs Java and `pip install moadapt[java]`. Each text is put before the line "A", so that it ends a sentence; the last
column lets texts follow each other instead, as the public evaluation does.
"""

import os
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent))

from nasty_texts import KINDS, texts

from moadapt_tasks.metrics.caption_tokens import PUNCTUATION
from moadapt_tasks.metrics.java_captions import require_java
from moadapt_tasks.metrics.penn_lexer import penn_tokens

JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
NEXT = "A"
"""What follows a text: it opens a sentence."""


def java_tokens(lines: Sequence[str]) -> list[list[str]]:
    """Cut texts without line ends as the public evaluation does, all in one file."""
    jar = require_java("The comparison") / JAR
    with TemporaryDirectory() as folder:
        file = Path(folder) / "texts"
        file.write_text("\n".join(lines), encoding="utf-8")
        options = ["-preserveLines", "-lowerCase", str(file)]
        command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", *options]
        done = subprocess.run(command, capture_output=True, check=True, env=os.environ | {"LC_ALL": "C.UTF-8"})
    cut = done.stdout.decode().split("\n")
    return [line.rstrip(" ").split(" ") if line.strip(" ") else [] for line in cut[: len(lines)]]


def java_tokens_apart(lines: Sequence[str]) -> list[list[str]]:
    """Cut texts each of which ends a sentence."""
    return java_tokens([line for text in lines for line in (text, NEXT)])[::2]


def words(tokens: Iterable[str]) -> list[str]:
    """Return what the evaluation leaves of tokens."""
    return [token for token in tokens if token not in PUNCTUATION]


def unlike_signs(characters: Iterable[str]) -> set[str]:
    """Return those characters that the two tokenisers do not take for the same even when they stand alone."""
    alone = sorted(set(characters))
    cut = java_tokens_apart([f"x {character} y" for character in alone])
    return {c for c, tokens in zip(alone, cut, strict=True) if tokens != penn_tokens(f"x {c} y")}


def kind_of(text: str, unlike: set[str]) -> str:
    """Say why a text is cut differently: the script of a character that is taken for something else, or `rule`."""
    found = sorted(set(text) & unlike)
    return unicodedata.name(found[0], "unassigned").split()[0].lower() if found else "rule"


def compare(lines: Sequence[str]) -> tuple[Counter[str], Counter[str], list[str]]:
    """Return the kinds of differences in tokens, those in words that metrics count, and texts of no such script."""
    ours = [penn_tokens(text) for text in lines]
    pairs = list(zip(lines, java_tokens_apart(lines), ours, strict=True))
    differing = [(text, java, own) for text, java, own in pairs if java != own]
    unlike = unlike_signs(character for text, *_ in differing for character in text if not character.isascii())
    in_tokens = Counter(kind_of(text, unlike) for text, *_ in differing)
    in_words = Counter(kind_of(text, unlike) for text, java, own in differing if words(java) != words(own))
    return in_tokens, in_words, [text for text, *_ in differing if kind_of(text, unlike) == "rule"]


def joined_differences(lines: Sequence[str]) -> int:
    """Count texts whose words differ where the next text decides how they end."""
    pairs = zip(java_tokens(lines), lines, strict=True)
    return sum(words(java) != words(penn_tokens(text)) for java, text in pairs)


def report(name: str, lines: Sequence[str]) -> None:
    """Print one row of the table, and the texts that no script explains."""
    in_tokens, in_words, unexplained = compare(lines)
    told = ", ".join(f"{kind} {count}" for kind, count in in_tokens.most_common()) or "-"
    counts = f"{len(lines)} | {in_tokens.total()} | {in_words.total()} | {told} | {joined_differences(lines)}"
    print(f"| {name} | {counts} |", *map(ascii, unexplained), sep="\n    ", flush=True)


if __name__ == "__main__":
    print("| texts | number | tokens differ | words differ | by script of the cause | words differ if joined |")
    print("|---|---|---|---|---|---|")
    for path in sys.argv[1:]:
        report(Path(path).stem, [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()])
    for kind, (_, count) in KINDS.items() if len(sys.argv) == 1 else ():
        report(kind, texts(kind, count))
