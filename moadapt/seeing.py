"""What a place lets its routers look at, in the call that is under way.

Axes: B rows, T tokens, D features.
"""

from dataclasses import replace

import torch
from torch import Tensor

from moadapt.call import Call
from moadapt.places import Place
from moadapt.router import RoutingContext


def see(call: Call, place: Place, hidden: Tensor | None, *, by_sequence: bool, reached: bool = True) -> RoutingContext:
    """Return what routers may look at that read these hidden states.

    Args:
        call: The current call.
        place: Where the routers sit.
        hidden: What enters there, (B, T, D); None for routers that read none.
        by_sequence: Whether they route rows as a whole.
        reached: Whether the block was reached that they read; a call without images does not reach those of a vision
            tower.

    Raises:
        ValueError: The hidden states have another shape, or rows of another axis.
    """
    given = RoutingContext(
        with_image=call.with_image,
        task_ids=call.task_ids,
        available=call.available,
        progress=call.progress,
        tower=place.tower,
        noise=None if call.noise is None else call.noise[place.name],
    )
    if hidden is None:
        return given
    if place.reads_encoder:
        if call.encoded is None:
            raise ValueError(
                f"the router at {place.name} reads the prompt as the encoder gives it, and encoder_outputs alone do "
                "not tell which of its tokens are prompt, or images; pass input_ids instead, or attention_mask where "
                "there are no images"
            )
        prompt, image = call.encoded
        return replace(given, hidden=hidden, prompt=prompt, real=prompt, image=image)
    if place.before_language:
        return replace(given, hidden=_embeddings(call, place, hidden) if reached else _no_patches(call, place.dim))
    seen = replace(given, hidden=hidden)
    if place.tower != "language":
        seen = _of_images(call, place, seen, hidden, by_sequence=by_sequence)
    elif hidden.ndim != 3:
        raise _shapeless(place, hidden)
    elif by_sequence and len(hidden) != call.num_rows:
        raise ValueError(
            f"the router by sequence at {place.name} would read input of shape {tuple(hidden.shape)}, whose first axis "
            f"is not the {call.num_rows} rows of the call, but images; use another per, or leave experts out there"
        )
    if _over_tokens(call, place, hidden):
        seen = replace(seen, prompt=call.prompt, real=call.real, image=call.image)
    return replace(given, hidden=_summary(seen)) if place.summarises else seen


def _over_tokens(call: Call, place: Place, hidden: Tensor) -> bool:
    """Tell whether a place reads one vector a token, and not as many patches by chance."""
    own = place.tower == "language" and not place.decodes
    return call.real is not None and own and hidden.shape[:2] == call.real.shape


def _of_images(call: Call, place: Place, seen: RoutingContext, hidden: Tensor, *, by_sequence: bool) -> RoutingContext:
    """Tell the rows of what a tower before the language tower holds.

    Raises:
        ValueError: The rows cannot be told, and a router by sequence needs them; or the input has another shape.
    """
    if hidden.ndim == 2 and call.packed:
        hidden = hidden.unsqueeze(0)
    if hidden.ndim != 3:
        raise _shapeless(place, hidden)
    if call.in_step(hidden):
        return replace(seen, hidden=hidden)
    rows = call.rows_in(hidden)
    if rows is None and by_sequence:
        raise ValueError(
            f"the router by sequence at {place.name} would read input of shape {tuple(hidden.shape)}, and how that "
            f"belongs to the {call.num_rows} rows of the call cannot be told; pass input_ids whose image tokens are "
            'those of the images, in order, or run rows one by one; or use constant weights, scope="token" with '
            "another per, or experts in the language tower only"
        )
    if by_sequence and call.padded:
        raise ValueError(
            f"the router by sequence at {place.name} would read pictures that only fill up rows with fewer than others "
            "have; give rows equally many pictures, or run rows one by one; or use a router by task, or experts in the "
            "language tower only"
        )
    return replace(seen, hidden=hidden, rows=rows, num_rows=call.num_rows)


def _shapeless(place: Place, hidden: Tensor) -> ValueError:
    return ValueError(
        f"the router at {place.name} would read input of shape {tuple(hidden.shape)}, which has no axis of rows; use "
        "constant weights there or place experts elsewhere"
    )


def _embeddings(call: Call, place: Place, patches: Tensor) -> Tensor:
    """Join each row's text features with its pooled patch embeddings, (B, 1, D)."""
    text = call.text_features
    if text is None:
        raise ValueError(
            "a router over the whole model with sites before the language tower needs input_ids; place adapters in the "
            'language tower only, or use per="layer"'
        )
    if len(call.image_rows) > 1:
        raise ValueError(
            "a router over the whole model with sites before the language tower decides once, but this call holds "
            "images and videos, which run through that tower one after the other; give them in calls of their own, or "
            'use per="layer"'
        )
    images = _of_images(call, place, RoutingContext(), patches, by_sequence=True).pooled
    return torch.cat([text, images], dim=-1).unsqueeze(1)


def _summary(seen: RoutingContext) -> Tensor:
    """Put the averages of each row's text and image side by side, (B, 1, D)."""
    averages = seen.pooled.unsqueeze(1) if seen.prompt is None else seen.means[0]
    return averages.flatten(1).unsqueeze(1)


def _no_patches(call: Call, width: int) -> Tensor:
    """Stand-in of `_embeddings` for a call without images."""
    assert call.text_features is not None, "text features are pooled when the call starts"
    missing = call.text_features.new_zeros(call.num_rows, width - call.text_features.shape[-1])
    return torch.cat([call.text_features, missing], dim=-1).unsqueeze(1)
