"""One forward pass of the base: its rows, what is prompt, and the routings decided so far."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moadapt.routing import Routing


@dataclass(frozen=True)
class Request:
    """What the caller said, for every forward pass of the base until it is done.

    Args:
        task_ids: Index of each row's task, (B,) or (1,).
        prompt_mask: Which tokens are prompt, (B, T).
        prompt_length: How many tokens the prompt of a generation has, padding included.
    """

    task_ids: Tensor | None = None
    prompt_mask: Tensor | None = None
    prompt_length: int | None = None

    def row_tasks(self, rows: int) -> Tensor | None:
        """Spread the tasks over the rows of a pass: one for all, or repeated for beams.

        Raises:
            ValueError: The numbers do not fit.
        """
        ids = self.task_ids
        if ids is None or len(ids) == rows:
            return ids
        if rows % len(ids):
            raise ValueError(f"got {len(ids)} task names for {rows} rows; give one name, or one a row")
        return ids.repeat_interleave(rows // len(ids))


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


def read_call(inputs: Mapping[str, Any], request: Request, image_token: int | None, *, continues: bool) -> Call:
    """Find out, from the base's own inputs, what a pass is about.

    Args:
        inputs: What the base was called with.
        request: What the caller said.
        image_token: Token id that stands for an image patch.
        continues: Whether the inputs go on from a filled cache, so that none of them is prompt.
    """
    ids, embeddings, pixels = (inputs.get(name) for name in ("input_ids", "inputs_embeds", "pixel_values"))
    tokens = ids if ids is not None else embeddings
    if tokens is None:
        rows = 1 if pixels is None else len(pixels)
        return Call(rows, task_ids=request.row_tasks(rows))
    image = ids == image_token if ids is not None and image_token is not None else None
    call = Call(len(tokens), image=image, task_ids=request.row_tasks(len(tokens)), continues=continues)
    if not continues:
        call.prompt = _prompt(inputs, request, tokens)
        call.images_match = pixels is None or images_match_rows(image, len(pixels))
    return call


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


def refuse_leaks(prompt: Tensor, labels: Tensor) -> None:
    """Refuse labels on what a router by sequence reads.

    Args:
        prompt: Which tokens are prompt, (B, T).
        labels: Training targets, (B, T).

    Raises:
        ValueError: A label lies on a prompt token, or a row has no prompt.
    """
    if bool((prompt & (labels != -100)).any()):
        raise ValueError(
            "labels lie on prompt tokens, which a router by sequence reads: it would see the answer; set labels to "
            "-100 on the prompt or pass a smaller prompt_mask"
        )
    empty = (~prompt.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"rows {empty} have no prompt token before their first label, so a router by sequence has nothing to read; "
            'pass prompt_mask or use scope="token"'
        )


def _prompt(inputs: Mapping[str, Any], request: Request, tokens: Tensor) -> Tensor:
    mask, labels, length = inputs.get("attention_mask"), inputs.get("labels"), tokens.shape[1]
    if isinstance(mask, Tensor) and mask.ndim == 2:
        real = mask[:, -length:].bool()
    else:
        real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if request.prompt_length is not None:  # without a cache, what was generated comes back as input
        real = real & (torch.arange(length, device=real.device) < request.prompt_length)
    given = request.prompt_mask
    return prompt_tokens(real, labels) if given is None else given.bool().to(real.device) & real
