"""The state of one forward pass of the base: its rows, what is prompt, and the routings decided so far.

A `CallContext` is owned by one mixture. The mixture opens a call when its base starts a forward pass and closes it when
the pass ends, however it ends; adapted modules read the current call. Gradient checkpointing recomputes a block after
the call is closed, so each checkpoint remembers the call it belongs to and restores it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moadapt.routing import Routing


@dataclass
class Call:
    """One forward pass of the base.

    Args:
        num_rows: B.
        prompt: Which tokens of this pass are prompt, (B, T); None while a cache is continued and in vision models.
        image: Which tokens stand for image patches, (B, T).
        task_ids: Index of each row's task, (B,).
        text_features: Pooled embeddings of the prompt's text, (B, D), where a router over the whole model needs them.
        routings: What routers have decided, by place.
        continues: Whether a cache that holds earlier tokens is continued.
        images_match: Whether row b owns image b and no other.
        recomputing: Whether a checkpointed block is run again for its backward pass.
    """

    num_rows: int
    prompt: Tensor | None = None
    image: Tensor | None = None
    task_ids: Tensor | None = None
    text_features: Tensor | None = None
    routings: dict[str, Routing] = field(default_factory=dict)
    continues: bool = False
    images_match: bool = True
    recomputing: bool = False


class CallContext:
    """Holds the current call of one mixture."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.enabled = True

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a checkpointed block's first run and of its recomputation."""
        call = self.call
        return nullcontext(), nullcontext() if call is None else self._restored(call)

    @contextmanager
    def _restored(self, call: Call) -> Iterator[None]:
        before, self.call = self.call, replace(call, routings=dict(call.routings), recomputing=True)
        try:
            yield
        finally:
            self.call = before


def prompt_tokens(real: Tensor, labels: Tensor | None) -> Tensor:
    """Find the prompt: the real tokens before each row's first label, or all of them where there are no labels.

    Args:
        real: Which tokens are no padding, (B, T).
        labels: Training targets, -100 where there is none, (B, T).
    """
    if labels is None:
        return real
    return real & ((labels != -100).cumsum(dim=1) == 0)


def images_match_rows(image: Tensor | None, num_images: int) -> bool:
    """Tell whether row b owns image b and no other, judged by the image tokens of each row.

    Args:
        image: Which tokens stand for image patches, (B, T); None where that is not known.
        num_images: How many images the call holds.
    """
    if image is None:
        return False
    counts = image.sum(dim=1)
    return num_images == len(counts) and bool(torch.all(counts == counts[0])) and bool(counts[0] > 0)
