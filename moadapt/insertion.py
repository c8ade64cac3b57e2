"""Where tokens stand that were inserted into rows, and what is cut off outputs because of them.

Axes: B rows, T tokens of the caller, n inserted tokens, H heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moadapt.call import Request

_OF_SPANS = ("start_logits", "end_logits")
# those with one axis of tokens; `attentions` have two
_OF_TOKENS = ("logits", "last_hidden_state", "hidden_states", *_OF_SPANS)


@dataclass(frozen=True)
class Insertion:
    """Where tokens stand that were inserted into rows.

    Args:
        positions: Of the inserted tokens, (B, n).
        own: Of the caller's own tokens, (B, T).
    """

    positions: Tensor
    own: Tensor

    @classmethod
    def before(cls, real: Tensor, count: int) -> "Insertion":
        """Insert before each row's first real token.

        Args:
            real: Which tokens are no padding, (B, T).
            count: n.
        """
        starts = (real > 0).int().argmax(dim=1, keepdim=True)
        places = torch.arange(real.shape[1], device=real.device)
        return cls(starts + torch.arange(count, device=real.device), places + count * (places >= starts))

    def into(self, values: Tensor, fill: int) -> Tensor:
        """Return values (B, T, ...) with `fill` at the inserted tokens, (B, T + n, ...)."""
        shape = (len(values), values.shape[1] + self.positions.shape[1], *values.shape[2:])
        return values.new_full(shape, fill).index_put((self._rows(), self.own.to(values.device)), values)

    def out_of(self, values: Tensor) -> Tensor:
        """Return values of the last tokens (B, up to T + n, ...) without those of inserted ones."""
        count, whole = self.positions.shape[1], self.own.shape[1] + self.positions.shape[1]
        own = self.own[:, whole - values.shape[1] :] - (whole - values.shape[1])
        assert own.shape[1] == values.shape[1] - count, "the base was asked for n more"
        return values[self._rows(), own.to(values.device)]

    def out_of_sequences(self, sequences: Tensor) -> Tensor:
        """Return generated sequences (B x k, T + n + new, ...), k a row, with the caller's own prompt in front.

        Those of a later step that holds its new token alone stay as they are.
        """
        times, whole = len(sequences) // len(self.own), self.own.shape[1] + self.positions.shape[1]
        if sequences.shape[1] < whole:
            return sequences
        own = self.own.to(sequences.device).repeat_interleave(times, dim=0)
        rows = torch.arange(len(sequences), device=sequences.device).unsqueeze(1)
        return torch.cat([sequences[rows, own], sequences[:, whole:]], dim=1)

    def moved(self, positions: Tensor) -> Tensor:
        """Return where the caller's tokens went; positions outside of the row, (B, ...), stay outside.

        Args:
            positions: Of one token a row, (B,) or (B, 1).
        """
        length, count = self.own.shape[1], self.positions.shape[1]
        own = self.own.to(positions.device).gather(1, positions.clamp(0, length - 1).view(len(positions), -1))
        inside = torch.where(positions < length, own.view(positions.shape), positions + count)
        return torch.where(positions < 0, positions, inside)

    def _rows(self) -> Tensor:
        return torch.arange(len(self.own)).unsqueeze(1)


@dataclass(frozen=True)
class Inserted:
    """A call of the base with inserted tokens.

    Args:
        inputs: What the base gets.
        request: What the caller said.
        where: The inserted tokens; None where there are none among these inputs.
        picked: Whether the caller picked the logits that it wants by their positions.
    """

    inputs: dict[str, Any]
    request: Request
    where: Insertion | None = None
    picked: bool = False

    def cut(self, output: Any) -> Any:
        """Return what the base gave, without what belongs to inserted tokens."""
        where = self.where
        if where is None:
            return output
        for name in _OF_TOKENS:
            found = getattr(output, name, None)
            if name == "logits" and self.picked:
                continue
            if isinstance(found, Tensor) and found.ndim == (2 if name in _OF_SPANS else 3):
                output[name] = where.out_of(found)
            elif isinstance(found, tuple):
                output[name] = tuple(where.out_of(each) for each in found)
        if getattr(output, "attentions", None) is not None:
            output["attentions"] = tuple(each if each is None else _square(where, each) for each in output.attentions)
        return output

    def cut_generated(self, output: Any) -> Any:
        """Return what `generate` gave, with the caller's own prompt in front."""
        if self.where is None:
            return output
        if isinstance(output, Tensor):
            return self.where.out_of_sequences(output)
        cut = self.where.out_of_sequences
        output["sequences"] = cut(output["sequences"])
        if getattr(output, "hidden_states", None) is not None:
            output["hidden_states"] = tuple(tuple(cut(each) for each in step) for step in output.hidden_states)
        return output


def _square(where: Insertion, attention: Tensor) -> Tensor:
    """Cut both axes of tokens, (B, H, T + n, T + n)."""
    by_query = where.out_of(attention.transpose(1, 2))  # (B, T, H, T + n)
    return where.out_of(by_query.transpose(1, 3)).permute(0, 2, 3, 1)
