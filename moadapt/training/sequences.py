"""Rows of tokens: padded to one side, with answers behind the prompts or apart from them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moadapt.training.batch import IGNORED


def append_answers(
    prompts: Mapping[str, Tensor], answers: Sequence[Sequence[int]], padding: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Put every row's answer behind its prompt and pad on the right.

    Args:
        prompts: What a processor gives for prompts, with `input_ids` and `attention_mask` (B, T). Answers are tokens of
            type 0; other tensors of that shape, such as Mllama's mask of the pictures that a token reads, go on as at
            the prompt's last token.
        answers: Token ids of every row's answer.
        padding: Token id to pad with.

    Returns:
        The inputs, and labels: the answers' tokens, -100 elsewhere, (B, T).
    """
    lengths = prompts["attention_mask"].sum(dim=1).tolist()
    width = max(length + len(answer) for length, answer in zip(lengths, answers, strict=True))
    inputs = padded(prompts, padding, "right", width)
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    going_on = [name for name in inputs if inputs[name].shape[:2] == labels.shape and not name.endswith("type_ids")]
    for row, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
        behind = slice(length, length + len(answer))
        for name in going_on:
            inputs[name][row, behind] = inputs[name][row, length - 1].clone()
        inputs["input_ids"][row, behind] = labels[row, behind] = torch.tensor(answer)
    return inputs, labels


def answers_apart(
    prompts: Mapping[str, Tensor], answers: Sequence[Sequence[int]], padding: int, start: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Give answers to a decoder, which reads each of their tokens to write the next.

    Args:
        prompts: What a processor gives for prompts, which the encoder reads.
        answers: Token ids of every row's answer.
        padding: Token id to pad with.
        start: Token id that the decoder reads to write the first.

    Returns:
        The inputs, with `decoder_input_ids` (B, A), and labels: the answers' tokens, -100 behind them, (B, A).
    """
    labels = torch.full((len(answers), max(map(len, answers))), IGNORED)
    for row, answer in enumerate(answers):
        labels[row, : len(answer)] = torch.tensor(answer)
    read = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return {
        **padded(prompts, padding, "right"),
        "decoder_input_ids": read.masked_fill(read == IGNORED, padding),
    }, labels


def padded(inputs: Mapping[str, Tensor], padding: int, side: str, width: int | None = None) -> dict[str, Tensor]:
    """Move the padding of every row to one side; some processors leave it between picture and text.

    Args:
        inputs: With `attention_mask` (B, T); tensors of that shape are padded again, others stay.
        padding: Token id to pad with.
        side: `left` or `right`.
        width: Length of the rows, at least that of the longest; None for that of the longest.
    """
    real = inputs["attention_mask"].bool()
    lengths = real.sum(dim=1).tolist()
    width = max(lengths) if width is None else width
    moved = dict(inputs)
    for name, tensor in inputs.items():
        if tensor.shape[:2] == real.shape:
            moved[name] = tensor.new_full(
                (len(tensor), width, *tensor.shape[2:]), padding if name == "input_ids" else 0
            )
            for row, length in enumerate(lengths):
                first = width - length if side == "left" else 0
                moved[name][row, first : first + length] = tensor[row][real[row]]
    return moved
