"""What the loaders give to a training module: one batch of rows, possibly of different tasks."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moadapt.task import Example

IGNORED = -100


class Batch:
    """Rows of one step on one process.

    No dataclass and no mapping: Lightning walks through those and stumbles over the frozen examples.

    Args:
        inputs: What the base takes: `input_ids` and `attention_mask` (B, T), pictures, and what else its processor
            gives. For training, prompt and answer padded on the right; else the prompt, padded on the left. An
            encoder-decoder gets the prompt, and what its decoder reads as `decoder_input_ids` (B, A).
        task_names: Task of every row, B names.
        rows: Index of every row among its split's rows, (B,).
        examples: The rows themselves.
        labels: Answer tokens, -100 elsewhere, (B, T), or (B, A) where a decoder writes them; the class of every row,
            (B, 1), where the base classifies; None where the answer is to be generated or found.
        classes: Names of the base's classes, of which every answer is one; none where answers are text.
    """

    def __init__(
        self,
        inputs: dict[str, Tensor],
        task_names: Sequence[str],
        rows: Tensor,
        examples: Sequence[Example],
        labels: Tensor | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self.inputs, self.task_names, self.rows, self.examples, self.labels = inputs, task_names, rows, examples, labels
        self.classes = classes
        self.apart = "decoder_input_ids" in inputs or bool(classes)
        """Whether the labels are a decoder's or classes, behind no prompt."""
        told = None if labels is None else self._following(labels) != IGNORED
        self.columns = None if told is None else told.any(dim=0).nonzero().flatten()
        """Positions whose next token is an answer token in some row, (C,), ascending."""
        self.step = 0
        """How many steps of training came before; keys noise."""
        self.spare = False
        """Whether its rows are another process's, run so that no process is waited for, and count nowhere.

        In training its losses are 0, and so are its counts of tokens.
        """

    def __len__(self) -> int:
        """Number of rows, B."""
        return len(self.task_names)

    @property
    def prompt_mask(self) -> Tensor:
        """Which tokens come before a row's answer, (B, T); there are none in pictures that are classified."""
        assert self.labels is not None, "a batch to generate from is all prompt"
        if self.apart:
            return self.inputs["attention_mask"].bool()
        return (self.labels != IGNORED).cumsum(dim=1) == 0

    @property
    def targets(self) -> Tensor:
        """The answer tokens that follow the positions `columns`, -100 where there is none, (B, C)."""
        assert self.labels is not None, "a batch to generate from has none"
        return self._following(self.labels)[:, self.columns]

    def task_ids(self, names: Sequence[str]) -> Tensor:
        """Return the index of every row's task, (B,), where its pictures and tokens are.

        Args:
            names: Of the tasks, in the order of their indices.
        """
        device = next(iter(self.inputs.values())).device if self.inputs else None
        return torch.tensor([names.index(name) for name in self.task_names], dtype=torch.long, device=device)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return the batch with its tensors on another device; row indices stay on the CPU."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def cast(self, dtype: torch.dtype) -> "Batch":
        """Return the batch with its pictures in another number type."""
        return self._with(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def _following(self, labels: Tensor) -> Tensor:
        """Return the labels that the logits of each position are about."""
        return labels if self.apart else labels[:, 1:]

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed = copy.copy(self)
        changed.inputs = {name: change(tensor) for name, tensor in self.inputs.items()}
        changed.labels = None if self.labels is None else change(self.labels)
        changed.columns = None if self.columns is None else change(self.columns)
        return changed
