"""Which tokens the adapters of a bank act on: a range of tokens, rows with or without an image, or both.

A bank that acts on some tokens adds exactly nothing to the others, `y_t + m_t delta_t` with `m_t` 0 or 1, so that in a
causal decoder whose images come first text-scoped adapters leave keys and values of the images alone. Tokens that were
inserted for adapters belong to no range. Axes: B rows, T tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import combinations
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moadapt.call import Call
from moadapt.image_rows import image_tokens_of
from moadapt.sites import Anatomy, Site

TokenRange = Literal["all", "image", "text", "question", "answer", "rows_with_image", "rows_without_image"]
RANGES: tuple[TokenRange, ...] = get_args(TokenRange)
_OF_IMAGES = ("image", "rows_with_image")
"""What every token is within that a vision tower or a connector has."""
_NEED_IMAGES = (*_OF_IMAGES, "rows_without_image")
_APART = (
    {"image", "text"},
    {"image", "question"},
    {"image", "answer"},
    {"image", "rows_without_image"},
    {"question", "answer"},
    {"rows_with_image", "rows_without_image"},
)


def ranges_of(acts_on: TokenRange | Sequence[TokenRange]) -> tuple[TokenRange, ...]:
    """Return the ranges that limit an adapter, each once, in the order of `RANGES`; none where it acts on all tokens.

    Args:
        acts_on: As the user wrote it.

    Raises:
        ValueError: A range is unknown, or no token could be within all of them.
    """
    given: Sequence[TokenRange] = (acts_on,) if isinstance(acts_on, str) else acts_on
    unknown = [name for name in given if name not in RANGES]
    if unknown or not given:
        raise ValueError(f"acts_on is {acts_on!r}; choose from {', '.join(RANGES)}, or several that shall all hold")
    found = tuple(name for name in RANGES[1:] if name in given)
    apart = next((pair for pair in combinations(found, 2) if set(pair) in _APART), None)
    if apart is not None:
        raise ValueError(f"acts_on is {acts_on!r}, but no token is within both {apart[0]} and {apart[1]}; drop one")
    return found


def ranges_at(site: Site, ranges: tuple[TokenRange, ...]) -> tuple[TokenRange, ...]:
    """Return those that tell tokens apart at a site: before the language tower all tokens are of images.

    Args:
        site: Where.
        ranges: Those of an adapter.
    """
    return ranges if site.tower == "language" else tuple(name for name in ranges if name not in _OF_IMAGES)


def check_ranges(
    adapter: str, ranges: tuple[TokenRange, ...], sites: Sequence[Site], base: PreTrainedModel, parts: Anatomy
) -> None:
    """Refuse ranges that make no sense for the base, or at the sites of an adapter.

    Args:
        adapter: Its name.
        ranges: Its ranges.
        sites: Where it sits.
        base: The base.
        parts: Its anatomy.

    Raises:
        ValueError: They make none; the message says why and what to do.
    """
    if not ranges:
        return
    what, kind = f"adapter {adapter!r} acts on {' and '.join(ranges)}", type(base).__name__
    sees = any(tower.name == "vision" for tower in parts.towers)
    telling = [name for name in ranges if name in _NEED_IMAGES or (sees and name in ("text", "question"))]
    if base.config.is_encoder_decoder:
        raise ValueError(f"{what}, but {kind} has encoder and decoder with tokens of their own; leave acts_on out")
    for site in sites:
        if site.tower != "language":
            if strange := ranges_at(site, ranges):
                raise ValueError(
                    f"{what}, but {site.path} is in the {site.tower} tower, where every token is one of an image and "
                    f"nothing is {strange[0]}; place it in the language tower, or leave that out"
                )
        elif telling and not image_tokens_of(base):
            raise ValueError(f"{what}, but {kind} has no token that stands for image patches; leave {telling[0]} out")
        elif site.layer is None and site.form not in ("norm", "embedding"):
            raise ValueError(
                f"{what}, but {site.path} lies outside the blocks of the language tower and may see some tokens only, "
                "so that they cannot be told there; place it in the blocks"
            )


def acting(call: Call, site: Site, ranges: tuple[TokenRange, ...], x: Tensor) -> Tensor:
    """Return which tokens of a call are within all ranges, (B, T), found once a call.

    Args:
        call: The call.
        site: Where it is asked.
        ranges: At least one.
        x: Input of the site.

    Raises:
        ValueError: The site's tokens are not those of the call.
    """
    rows, tokens = (0, 0) if call.real is None else call.real.shape
    lengths = x.shape[1:3] if x.ndim == 4 else x.shape[1:2]  # norms of heads: either may be T
    if len(x) != rows or tokens not in lengths or (x.ndim == 2 and x.is_floating_point()):
        raise ValueError(
            f"adapters at {site.path} act on {' and '.join(ranges)}, but its input of shape {tuple(x.shape)} has not "
            f"the {rows} rows and {tokens} tokens of the call; leave the site or acts_on out"
        )
    return call.once(f"acting on {' and '.join(ranges)}", lambda: reduce(torch.logical_and, _find(call, ranges)))


def _find(call: Call, ranges: tuple[TokenRange, ...]) -> list[Tensor]:
    assert call.real is not None, "checked above"
    real = call.real if call.inserted is None else call.real.scatter(1, call.inserted, value=False)
    return [_MASKS[name](call, real) for name in ranges]


def _text(call: Call, real: Tensor) -> Tensor:
    return real if call.image is None else real & ~call.image


def _image(call: Call, real: Tensor) -> Tensor:
    assert call.image is not None, "the call context refuses calls that do not tell"
    return real & call.image


def _question(call: Call, real: Tensor) -> Tensor:
    return torch.zeros_like(real) if call.prompt is None else _text(call, real) & call.prompt


def _answer(call: Call, real: Tensor) -> Tensor:
    """What stands behind the last token of the prompt; all that continues a cache does."""
    if call.prompt is None:
        return real
    ahead = call.prompt.flip(1).cumsum(dim=1).flip(1)  # how many tokens of the prompt stand there or behind
    return real & (ahead == 0)


def _rows_with_image(call: Call, real: Tensor) -> Tensor:
    assert call.with_image is not None, "the call context refuses calls that do not tell"
    return call.with_image.unsqueeze(1).expand_as(real)


_MASKS: Mapping[TokenRange, Callable[[Call, Tensor], Tensor]] = {
    "image": _image,
    "text": _text,
    "question": _question,
    "answer": _answer,
    "rows_with_image": _rows_with_image,
    "rows_without_image": lambda call, real: ~_rows_with_image(call, real),
}
