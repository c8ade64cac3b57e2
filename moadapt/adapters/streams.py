"""The streams of a call: which tokens are text, which stand for images, and which text is prompt, gathered by row.

Only images of the prompt count, so that a token is taken for the same whether a cache is continued or all is computed
again. Axes: B rows, T tokens, N tokens of the row with most of them, R features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moadapt.call import Call


@dataclass(frozen=True)
class Stream:
    """Some tokens of each row, the others' places being filled with any.

    Args:
        index: Where they are, (B, N), each once.
        real: Which of these places hold one, (B, N).
    """

    index: Tensor
    real: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """Return the features of these tokens, (B, N, R).

        Args:
            tensor: Those of all tokens, (B, T, R).
        """
        return tensor.gather(1, self.index.unsqueeze(-1).expand(-1, -1, tensor.shape[-1]))

    def spread(self, tensor: Tensor, tokens: int) -> Tensor:
        """Put features back where they belong, (B, T, R); other tokens get zero.

        Args:
            tensor: (B, N, R).
            tokens: T.
        """
        where = self.index.unsqueeze(-1).expand_as(tensor)
        empty = tensor.new_zeros(len(tensor), tokens, tensor.shape[-1])
        return empty.scatter(1, where, tensor * self.real.unsqueeze(-1))


@dataclass(frozen=True)
class Streams:
    """The streams of a call.

    Args:
        image: Tokens of the prompt that stand for images.
        text: All others, padding included.
        question: The text of the prompt.
    """

    image: Stream
    text: Stream
    question: Stream


def streams(call: Call, x: Tensor, path: str) -> Streams:
    """Return the streams of a call that has a prompt, found once a call.

    Args:
        call: The call.
        x: Input of a site, (B, T, D).
        path: The site, for the message.

    Raises:
        ValueError: The site's tokens are not those of the call.
    """
    assert call.prompt is not None, "streams are those of a prompt"
    if x.shape[:2] != call.prompt.shape:
        raise ValueError(
            f"{path} gets input of shape {tuple(x.shape)}, but the call has tokens {tuple(call.prompt.shape)}, so "
            "text and image tokens cannot be told there; place cross-modal adapters elsewhere"
        )
    return call.once("streams", lambda: _find(call))


def _find(call: Call) -> Streams:
    assert call.prompt is not None, "checked above"
    image = torch.zeros_like(call.prompt) if call.image is None else call.image & call.prompt
    masks = (image, ~image, call.prompt & ~image)
    counts = torch.stack([mask.sum(dim=1) for mask in masks])
    longest = counts.amax(dim=1).clamp(min=1).tolist()  # one at least, so that parameters stay in the graph
    order = [torch.argsort(~mask, dim=1, stable=True)[:, :most] for mask, most in zip(masks, longest, strict=True)]
    return Streams(*(Stream(index, mask.gather(1, index)) for index, mask in zip(order, masks, strict=True)))
