"""Batches for bases that classify: a row's answer is one of the classes that the base's head knows by name."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moadapt.task import Example
from moadapt.training.batch import Batch
from moadapt.training.collate import Item, open_pictures


class ClassCollator:
    """Makes batches of texts, or of pictures, with the classes that they belong to.

    Texts are cut to the length that the tokenizer allows. A base of pictures gets one a row and reads no prompt.

    Args:
        processor: A tokenizer, or the image processor of a base without text.
        classes: Names of the base's classes, in the order of its logits.
        answers: Whether to give classes, for training, or to leave them to be found.
    """

    def __init__(self, processor: Any, classes: Sequence[str], *, answers: bool) -> None:
        self.processor, self.classes, self.answers = processor, tuple(classes), answers
        self._index = {name: index for index, name in enumerate(classes)}

    def __call__(self, items: Sequence[Item]) -> Batch:
        """Return the batch of some rows, which may be none.

        Raises:
            ValueError: An answer is no class, a picture cannot be read, or a row has pictures where the base reads
                text, or not one where it reads pictures; the entry is named.
        """
        names, examples = [item.task for item in items], [item.example for item in items]
        rows = torch.tensor([item.row for item in items], dtype=torch.long)
        inputs = self._read(examples) if items else {}
        labels = None
        if self.answers and items:
            labels = torch.tensor([[self._class_of(example)] for example in examples])
        return Batch(inputs, names, rows, examples, labels, self.classes)

    def length(self, item: Item) -> int:
        """Return the tokens of a row.

        Raises:
            ValueError: The base reads pictures, which have none.
        """
        inputs = self._read([item.example])
        if "input_ids" not in inputs:
            raise ValueError("this base reads pictures alone, all of one size; leave batch_tokens out, give batch_size")
        return int(inputs["input_ids"].shape[1])

    def _read(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        reads_text = isinstance(self.processor, PreTrainedTokenizerBase)
        for example in examples:
            if len(example.pictures) != (0 if reads_text else 1):
                raise ValueError(
                    f"{example.entry}: has {len(example.pictures)} pictures, and this base classifies "
                    f"{'texts, so give none' if reads_text else 'pictures, so give one'}"
                )
        if reads_text:
            prompts = [example.prompt for example in examples]
            return dict(self.processor(prompts, padding=True, truncation=True, return_tensors="pt"))
        return dict(self.processor([open_pictures(example)[0] for example in examples], return_tensors="pt"))

    def _class_of(self, example: Example) -> int:
        """Return the class of a row's answer: the first that is one, where several are right."""
        found = [self._index[answer] for answer in example.answers if answer in self._index]
        if not found:
            shown = ", ".join(self.classes[:10]) + (" and others" if len(self.classes) > 10 else "")
            raise ValueError(
                f"{example.entry}: its answer {', '.join(map(repr, example.answers))} is no class of this base, which "
                f"knows {shown}; spell answers like them, or write the names into id2label of the base's config"
            )
        return found[0]
