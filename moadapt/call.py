"""One forward pass of the base: its rows, what is prompt, and the routings decided so far."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from moadapt.image_rows import ImageRows
from moadapt.routing import Routing

if TYPE_CHECKING:
    from moadapt.shared_copies import Copied

T = TypeVar("T")
_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


@dataclass(frozen=True)
class Request:
    """What the caller said, for every forward pass of the base until it is done.

    Args:
        task_ids: Index of each row's task, (B,) or (1,).
        prompt_mask: Which tokens are prompt, (B, T).
        prompt_shape: Rows and tokens of the prompt of a generation, padding included.
        inserted: Positions of the tokens that were inserted for adapters, (B, n).
    """

    task_ids: Tensor | None = None
    prompt_mask: Tensor | None = None
    prompt_shape: tuple[int, int] | None = None
    inserted: Tensor | None = None

    def row_tasks(self, rows: int) -> Tensor | None:
        """Spread the tasks over the rows of a pass: one for all, or one a row, repeated for the beams of a generation.

        Raises:
            ValueError: The numbers do not fit.
        """
        ids = self.task_ids
        if ids is None or len(ids) == rows:
            return ids
        beams = self.prompt_shape is not None and len(ids) == self.prompt_shape[0] and rows % len(ids) == 0
        if len(ids) != 1 and not beams:
            raise ValueError(f"got {len(ids)} task names for {rows} rows; give one name, or one a row")
        return ids.repeat_interleave(rows // len(ids))


@dataclass
class Call:
    """One forward pass of the base.

    Args:
        num_rows: B.
        prompt: Which tokens of this pass are prompt, (B, T); None while a cache is continued and in vision models.
        real: Which tokens of this pass are no padding, (B, T); None in vision models.
        image: Which tokens stand for image patches, (B, T).
        with_image: Which rows have an image in their prompt, (B,), as held with the cache where one is continued.
        inserted: Positions of the tokens of this pass that were inserted for adapters, (B, n).
        task_ids: Index of each row's task, (B,).
        copies: Which copy of the shared adapter each row uses, where it stands in banks once a task.
        available: Which experts routers may choose, (E,).
        progress: How much of the training is over, a scalar; None where nothing is trained.
        noise: For each place what its router draws from where all processes draw the same.
        memories: What a bank keeps of the prompt for the passes that continue its cache, by module path; row axis
            first.
        encoded: Which of the tokens that an encoder read are prompt, (B, T), and which of these stand for images, where
            a decoder of its own follows.
        text_features: Pooled embeddings of the prompt's text, (B, D), where a router over the whole model needs them.
        routings: What routers have decided, by place.
        continues: Whether a cache that holds earlier tokens is continued.
        image_rows: Which row each image belongs to, for each run of the vision tower; empty where nobody asks.
        run: Which of these runs is under way, or was the last; -1 before the first.
        recomputing: Whether a checkpointed block is run again for its backward pass.
        overridden: Whether the user's own weights stand in `routings` for every place.
    """

    num_rows: int
    prompt: Tensor | None = None
    real: Tensor | None = None
    image: Tensor | None = None
    with_image: Tensor | None = None
    inserted: Tensor | None = None
    task_ids: Tensor | None = None
    copies: "Copied | None" = None
    available: Tensor | None = None
    progress: Tensor | None = None
    noise: Mapping[str, torch.Generator] | None = None
    memories: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    encoded: tuple[Tensor, Tensor | None] | None = None
    text_features: Tensor | None = None
    routings: dict[str, Routing] = field(default_factory=dict)
    continues: bool = False
    image_rows: tuple[ImageRows, ...] = ()
    run: int = -1
    recomputing: bool = False
    overridden: bool = False
    _found: dict[str, Any] = field(default_factory=dict, repr=False)

    def along_tokens(self, x: Tensor) -> bool:
        """Tell whether what runs through the vision tower has the patches of all images in its axis of tokens.

        Args:
            x: (N, P, D), (1, P, D) or (P, D).
        """
        return self.packed and (x.ndim == 2 or (x.ndim == 3 and len(x) == 1))

    def rows_in(self, x: Tensor) -> Tensor | None:
        """Return the row of each image, tile, window or patch in what runs through the vision tower, (entries,).

        Args:
            x: As in `along_tokens`.

        Returns:
            None where the rows cannot be told.
        """
        count = x.shape[-2] if self.along_tokens(x) else len(x)
        if self.num_rows == 1:
            return torch.zeros(count, dtype=torch.long, device=x.device)
        return self.once(f"rows of {count}", lambda: self._find_rows(count, x.device))

    def in_step(self, x: Tensor) -> bool:
        """Tell whether row b of the call is row b of what runs through the vision tower, so that nothing is looked up.

        Args:
            x: As in `along_tokens`.
        """
        images = self._images
        return len(x) == self.num_rows and (self.real is None or (images is not None and images.one_each))

    def _find_rows(self, count: int, device: torch.device) -> Tensor | None:
        found = None if self._images is None else self._images.of(count)
        return None if found is None else found.to(device)

    @property
    def packed(self) -> bool:
        """Whether the vision tower has the patches of all images in one axis."""
        return self._images is not None and self._images.packed

    @property
    def padded(self) -> bool:
        """Whether the vision tower also runs pictures that only fill up rows."""
        return self._images is not None and self._images.padded

    @property
    def _images(self) -> ImageRows | None:
        return self.image_rows[max(self.run, 0)] if self.image_rows else None

    def once(self, name: str, find: Callable[[], T]) -> T:
        """Return what banks need of the call as a whole, found by the first of them.

        Args:
            name: Of what is found.
            find: Finds it.
        """
        if name not in self._found:
            self._found[name] = find()
        found: T = self._found[name]
        return found


def read_call(inputs: Mapping[str, Any], request: Request, image_tokens: Sequence[int], *, continues: bool) -> Call:
    """Find out, from the base's own inputs, what a pass is about.

    Args:
        inputs: What the base was called with.
        request: What the caller said.
        image_tokens: Token ids that stand for patches of images and videos.
        continues: Whether the inputs go on from a filled cache, so that none of them is prompt.
    """
    ids, pixels = inputs.get("input_ids"), inputs.get("pixel_values")
    tokens = next((inputs[name] for name in _TOKENS if inputs.get(name) is not None), None)
    if tokens is None:
        rows = 1 if pixels is None else len(pixels)
        return Call(rows, task_ids=request.row_tasks(rows))
    image = (
        None if ids is None or not image_tokens else torch.stack([ids == token for token in image_tokens]).any(dim=0)
    )
    call = Call(len(tokens), image=image, task_ids=request.row_tasks(len(tokens)), continues=continues)
    call.real = _real(inputs.get("attention_mask"), tokens)
    if not continues:
        call.prompt = _prompt(inputs, request, call.real)
        call.inserted = _inserted(request, tokens)
        if call.inserted is not None:  # no reader of the prompt may read them
            call.prompt = call.prompt.scatter(1, call.inserted, value=False)
        call.with_image = None if image is None else (image & call.prompt).any(dim=1)
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


def check_prompt(prompt: Tensor, labels: Tensor | None, reader: str) -> None:
    """Refuse a prompt that holds answers, where something reads the whole of it.

    Args:
        prompt: Which tokens are prompt, (B, T).
        labels: Training targets; those that are no (B, T) lie on no token.
        reader: What reads it, for the message.

    Raises:
        ValueError: A label lies on a prompt token.
    """
    if labels is not None and labels.shape == prompt.shape and bool((prompt & (labels != -100)).any()):
        raise ValueError(
            f"labels lie on prompt tokens, which {reader} reads: it would see the answer; set labels to -100 on the "
            "prompt or pass a smaller prompt_mask"
        )


def check_filled(prompt: Tensor) -> None:
    """Refuse rows without a prompt, which a router by sequence could not route.

    Args:
        prompt: Which tokens are prompt, (B, T).

    Raises:
        ValueError: A row has none.
    """
    empty = (~prompt.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"rows {empty} have no prompt token before their first label, so a router by sequence has nothing to read; "
            'pass another prompt_mask or use scope="token"'
        )


def _inserted(request: Request, tokens: Tensor) -> Tensor | None:
    """Return the inserted tokens of a pass whose rows may be those of the request repeated for beams."""
    places = request.inserted
    if places is None:
        return None
    if int(places.max()) >= tokens.shape[1]:
        raise ValueError("adapters insert tokens before the whole prompt; leave prefill_chunk_size unset")
    return places.to(tokens.device).repeat_interleave(len(tokens) // len(places), dim=0)


def _prompt(inputs: Mapping[str, Any], request: Request, real: Tensor) -> Tensor:
    labels, length = inputs.get("labels"), real.shape[1]
    if request.prompt_shape is not None:  # without a cache, what was generated comes back as input
        real = real & (torch.arange(length, device=real.device) < request.prompt_shape[1])
    given = request.prompt_mask
    if given is not None:
        if given.shape != real.shape:
            raise ValueError(f"prompt_mask has shape {tuple(given.shape)}, but the tokens have {tuple(real.shape)}")
        return given.bool().to(real.device) & real
    return prompt_tokens(real, labels if labels is not None and labels.shape == real.shape else None)


def _real(mask: Any, tokens: Tensor) -> Tensor:
    """Which tokens are no padding, (B, T), from any mask that a base accepts."""
    if isinstance(mask, Mapping):  # one a kind of layer, or None where nothing is masked
        mask = next((each for each in mask.values() if each is not None), None)
    if mask is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise ValueError(f"attention_mask is a {type(mask).__name__}, which tells no padding; pass a mask (B, T)")
    if mask.ndim == 2:
        return mask[:, -tokens.shape[1] :].bool()
    itself = mask[:, 0].diagonal(dim1=-2, dim2=-1)  # a real token attends at least to itself
    return itself if itself.dtype == torch.bool else itself == 0
