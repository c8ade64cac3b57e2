"""Answers as token ids that follow a prompt, and back."""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property

from moadapt.training.prompts import PromptWriter

GROUNDING = re.compile(
    r"<(?:loc|seg|patch_index)_?\d+>|</?(?:ref|box|quad|phrase|object)>|</delimiter_of_multi_objects/>"
)
"""Special tokens that answers are made of: places in a picture, and what is put around them and their names.

PaliGemma and Florence-2 write `<loc0123>` and `<loc_123>`, Kosmos-2 `<patch_index_0123>`, InternVL `<ref>` and `<box>`.
"""
_MARK = "\ufdd0answer\ufdd1"


class AnswerWriter:
    """Writes answers so that a base reads their tokens as it would generate them.

    With a chat template, an answer is the assistant's turn up to its end. Without one, the end of sequence follows it.
    Text in it that looks like a special token stays text, unless boxes are written with it.

    Args:
        prompts: Writes the prompts.
        apart: Whether answers are a sequence of their own, as a decoder behind an encoder writes them.
    """

    def __init__(self, prompts: PromptWriter, *, apart: bool = False) -> None:
        self.tokenizer, self.apart = prompts.tokenizer, apart
        self.lead, end = "", ""
        if prompts.has_template:
            self.lead, end = _around(prompts)
        specials = {token.content: each for each, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.hidden = {each for token, each in specials.items() if not GROUNDING.fullmatch(token)}
        ends = [each for each in self.tokenizer(end, add_special_tokens=False).input_ids if each in self.hidden]
        self.end: int = (ends or [self.tokenizer.eos_token_id])[0]
        """The token that ends an answer."""
        unlike = {token for token, each in specials.items() if each in self.hidden} | set(prompts.placeholders)
        cuts = "|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in unlike if len(token) > 1)
        self._cuts = re.compile(cuts or "(?!)")

    def tokens(self, answers: Sequence[str]) -> list[list[int]]:
        """Return answers as tokens, that which ends an answer last.

        Args:
            answers: One a row.
        """
        texts = [self._cuts.split(self.lead + answer) for answer in answers]
        pieces = iter(self._continued([piece for text in texts for piece in text]))
        start = self._start if self.apart else []
        return [[*start, *(each for _ in text for each in next(pieces)), self.end] for text in texts]

    def text(self, tokens: Iterable[int]) -> str:
        """Return generated tokens as text, without special ones, but those that boxes are written with.

        Args:
            tokens: Of one answer.
        """
        shown = [each for each in tokens if each not in self.hidden]
        text: str = self.tokenizer.decode(shown, skip_special_tokens=False)
        return text

    def _continued(self, pieces: list[str]) -> list[list[int]]:
        """Encode pieces as they are within a text: sentencepiece puts a space before a text of its own."""
        ahead = "" if self.apart else "\n"
        found = self.tokenizer([ahead + piece for piece in pieces], add_special_tokens=False).input_ids
        alone = self.tokenizer(ahead, add_special_tokens=False).input_ids
        rows = zip(found, pieces, strict=True)
        return [
            ids[len(alone) :]
            if ids[: len(alone)] == alone
            else self.tokenizer(piece, add_special_tokens=False).input_ids
            for ids, piece in rows
        ]

    @cached_property
    def _start(self) -> list[int]:
        """What the tokenizer puts before a text of its own."""
        around: list[int] = self.tokenizer("").input_ids
        return around[:-1] if around[-1:] == [self.tokenizer.eos_token_id] else around


def _around(prompts: PromptWriter) -> tuple[str, str]:
    """Return what a template writes between a prompt and its answer, and behind the answer.

    Nothing of either, where the assistant's turn does not begin as the template's own generation prompt does.
    """
    turns = [prompts.turn("user", "?"), prompts.turn("assistant", _MARK)]
    before = prompts.render(turns[:1], add_generation_prompt=True)
    lead, found, end = prompts.render(turns).partition(_MARK)
    return (lead.removeprefix(before), end) if found and lead.startswith(before) else ("", "")
