"""From examples to a batch: open pictures, write prompts, append answers, mask what is no answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from moadapt.task import Example
from moadapt.training.answers import AnswerWriter
from moadapt.training.batch import IGNORED, Batch
from moadapt.training.prompts import PromptWriter
from moadapt.training.sequences import answers_apart, append_answers, padded


@dataclass(frozen=True)
class Item:
    """One row on its way into a batch.

    Args:
        task: Name of its task.
        example: The row.
        row: Its index in the split.
        turn: How often it was drawn before.
    """

    task: str
    example: Example
    row: int
    turn: int = 0


class Collator:
    """Makes batches; runs in the loaders' worker processes.

    Args:
        processor: The base's processor.
        seed: Chooses among several right answers.
        answers: Whether to append answers, for training, or to leave the prompt alone, for generation.
        decoder_start: For an encoder-decoder, the token that its decoder begins with; None for other bases.
    """

    def __init__(self, processor: Any, *, seed: int, answers: bool, decoder_start: int | None = None) -> None:
        self.prompts = PromptWriter(processor, encoder=decoder_start is not None)
        self.written = AnswerWriter(self.prompts, apart=decoder_start is not None)
        self.seed, self.answers, self.decoder_start = seed, answers, decoder_start

    def __call__(self, items: Sequence[Item]) -> Batch:
        """Return the batch of some rows, which may be none.

        Raises:
            ValueError: A picture cannot be read; its file and entry are named.
        """
        names, examples = [item.task for item in items], [item.example for item in items]
        rows = torch.tensor([item.row for item in items], dtype=torch.long)
        if not items:
            return Batch({}, names, rows, examples)
        pictures = [open_pictures(example) for example in examples]
        prompts = dict(self.prompts.prompt_tokens([example.prompt for example in examples], pictures))
        told_by_type = prompts.pop("labels", None) is not None
        padding = self.prompts.tokenizer.pad_token_id
        if not self.answers:
            return Batch(self._to_generate_from(prompts, padding), names, rows, examples)
        answers = self.written.tokens([self._chosen(item) for item in items])
        if self.decoder_start is not None:
            inputs, labels = answers_apart(prompts, answers, padding, self.decoder_start)
        else:
            inputs, labels = append_answers(prompts, answers, padding)
        if told_by_type:  # PaliGemma: tokens of type 0 see the whole prompt, also what comes later; answers must not
            inputs["token_type_ids"][labels != IGNORED] = 1
        return Batch(inputs, names, rows, examples, labels)

    def length(self, item: Item) -> int:
        """Return the tokens of a row with its longest answer, both sequences of an encoder-decoder together."""
        prompt = self.prompts.prompt_tokens([item.example.prompt], [open_pictures(item.example)])
        answers = self.written.tokens(item.example.answers)
        return int(prompt["attention_mask"].sum()) + max(map(len, answers))

    def _to_generate_from(self, prompts: dict[str, Tensor], padding: int) -> dict[str, Tensor]:
        if self.decoder_start is None:
            return padded(prompts, padding, "left")
        first = torch.full((len(prompts["input_ids"]), 1), self.decoder_start)
        prompts = padded(prompts, padding, "right")  # BART counts positions from padding, too
        return {**prompts, "decoder_input_ids": first}

    def _chosen(self, item: Item) -> str:
        """Pick one of the answers: each turn another, in an order of the row's own, until all were seen."""
        answers = item.example.answers
        if len(answers) == 1:
            return answers[0]
        order = np.random.default_rng([self.seed, 2, item.row]).permutation(len(answers))
        return answers[int(order[item.turn % len(answers)])]


def open_pictures(example: Example) -> list[Image]:
    """Read a row's pictures as RGB.

    Raises:
        ValueError: One is missing or broken; file and entry are named.
    """
    try:
        return [picture.open() for picture in example.pictures]
    except ValueError as error:
        raise ValueError(f"{example.entry}: {error}") from error
