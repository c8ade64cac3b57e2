"""From examples to a batch: open pictures, write prompts, append answers, mask what is no answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from moadapt.task import Example
from moadapt.training.batch import IGNORED, Batch
from moadapt.training.prompts import PromptWriter


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
    """

    def __init__(self, processor: Any, *, seed: int, answers: bool) -> None:
        self.writer, self.seed, self.answers = PromptWriter(processor), seed, answers

    def __call__(self, items: Sequence[Item]) -> Batch:
        """Return the batch of some rows, which may be none.

        Raises:
            ValueError: A picture cannot be read; its file and entry are named.
        """
        names, examples = [item.task for item in items], [item.example for item in items]
        rows = torch.tensor([item.row for item in items], dtype=torch.long)
        if not items:
            return Batch({}, names, rows, examples)
        asked = [example.prompt for example in examples]
        prompts = dict(self.writer.prompt_tokens(asked, [open_pictures(example) for example in examples]))
        told_by_type = prompts.pop("labels", None) is not None
        if not self.answers:
            return Batch(prompts, names, rows, examples)
        counts = [len(example.pictures) for example in examples]
        answers = self.writer.answer_tokens(asked, [self._chosen(item) for item in items], counts)
        inputs, labels = append_answers(prompts, answers, self.writer.tokenizer.pad_token_id)
        if told_by_type:  # PaliGemma: tokens of type 0 see the whole prompt, also what comes later; answers must not
            inputs["token_type_ids"][labels != IGNORED] = 1
        return Batch(inputs, names, rows, examples, labels)

    def _chosen(self, item: Item) -> str:
        """Pick one of the answers: each turn another, in an order of the row's own, until all were seen."""
        answers = item.example.answers
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


def append_answers(
    prompts: dict[str, Tensor], answers: Sequence[Sequence[int]], padding: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Put every row's answer behind its prompt and pad on the right.

    Args:
        prompts: What a processor gives for prompts, with `input_ids` and `attention_mask` (B, T); other tensors of
            that shape go on as at the prompt's last token.
        answers: Token ids of every row's answer.
        padding: Token id to pad with.

    Returns:
        The inputs, and labels: the answers' tokens, -100 elsewhere, (B, T).
    """
    real = prompts["attention_mask"].bool()
    lengths = real.sum(dim=1).tolist()
    width = max(length + len(answer) for length, answer in zip(lengths, answers, strict=True))
    fill = {"input_ids": padding, "attention_mask": 0}
    inputs = {
        name: _extended(tensor, real, answers, width, fill.get(name, 0)) if tensor.shape[:2] == real.shape else tensor
        for name, tensor in prompts.items()
    }
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    for row, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
        ids = torch.tensor(answer)
        inputs["input_ids"][row, length : length + len(answer)] = ids
        labels[row, length : length + len(answer)] = ids
    return inputs, labels


def _extended(tensor: Tensor, real: Tensor, answers: Sequence[Sequence[int]], width: int, fill: int) -> Tensor:
    """Move rows to the left edge and repeat each row's last real entry over its answer."""
    extended = tensor.new_full((len(tensor), width, *tensor.shape[2:]), fill)
    for row, answer in enumerate(answers):
        own = tensor[row][real[row]]
        extended[row, : len(own)] = own
        extended[row, len(own) : len(own) + len(answer)] = own[-1]
    return extended
