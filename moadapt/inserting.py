"""Tokens that adapters put before each row's first real token.

They are inserted into what the caller gave, as real tokens to the base, so that positions, masks, caches and beams need
nothing else; a bank at the entry of the language tower puts its own vectors in their place, and what comes out of the
base is cut back to the caller's tokens. Axes: B rows, T tokens of the caller, n inserted tokens.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moadapt.adapters.family import Adapter
from moadapt.call import Request

_OF_TOKENS = ("logits", "last_hidden_state", "hidden_states")
_NOT_OF_TOKENS = ("pixel", "image", "video")
_REFUSED = ("inputs_embeds", "position_ids", "cache_position")


def count_inserted(adapters: Iterable[Adapter]) -> int:
    """Return how many tokens the adapters of a mixture insert: those of the shared one, then those of the experts.

    Args:
        adapters: All of them.

    Raises:
        ValueError: Experts insert different numbers of tokens.
    """
    adapters = tuple(adapters)
    asked = {a.name: a.spec.inserts() for a in adapters if a.expert is not None and a.spec.inserts()}
    if len(set(asked.values())) > 1:
        raise ValueError(
            f"experts insert different numbers of tokens, {asked}, so rows would differ in length by their routing; "
            "give all of them one length"
        )
    return max(asked.values(), default=0) + sum(a.spec.inserts() for a in adapters if a.expert is None)


def plain_token(base: PreTrainedModel) -> int:
    """Return the id of a token that stands for nothing in particular: the first of a text, or an ordinary one.

    Args:
        base: Its config names the ids that stand for something.
    """
    configs = [vars(each) for each in (base.config, base.config.get_text_config())]
    special: set[Any] = set()
    for config in configs:
        for name, value in config.items():
            if name.endswith(("token_id", "token_index")) and name != "bos_token_id":
                special.update(value if isinstance(value, list) else [value])
    first = next((c["bos_token_id"] for c in configs if isinstance(c.get("bos_token_id"), int)), 0)
    embeddings: Any = base.get_input_embeddings()
    return int(next(token for token in (first, *range(len(embeddings.weight))) if token not in special))


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
        starts = real.int().argmax(dim=1, keepdim=True)
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
        """Return generated sequences (B x k, T + n + new), k a row, with the caller's own prompt in front."""
        times, whole = len(sequences) // len(self.own), self.own.shape[1] + self.positions.shape[1]
        own = self.own.to(sequences.device).repeat_interleave(times, dim=0)
        return torch.cat([sequences[:, :whole].gather(1, own), sequences[:, whole:]], dim=1)

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
        for name in _OF_TOKENS if self.where is not None else ():
            found = getattr(output, name, None)
            if name == "logits" and self.picked:
                continue
            if isinstance(found, Tensor) and found.ndim == 3:
                output[name] = self.where.out_of(found)  # type: ignore[union-attr]
            elif isinstance(found, tuple):
                output[name] = tuple(self.where.out_of(each) for each in found)  # type: ignore[union-attr]
        return output

    def cut_generated(self, output: Any) -> Any:
        """Return what `generate` gave, with the caller's own prompt in front."""
        if self.where is None:
            return output
        if isinstance(output, Tensor):
            return self.where.out_of_sequences(output)
        output["sequences"] = self.where.out_of_sequences(output["sequences"])
        return output


def insert(inputs: Mapping[str, Any], request: Request, count: int, token: int, *, generates: bool = False) -> Inserted:
    """Insert tokens into what the base is called with; a filled cache holds them already, and then only masks grow.

    Args:
        inputs: What the caller gave.
        request: What the caller said.
        count: n; 0 changes nothing.
        token: What to insert.
        generates: Whether it is `generate` that is called, which cuts off itself what a cache holds.

    Raises:
        ValueError: The inputs are no token ids, or tell positions, which the inserted tokens would shift.
    """
    if not count:
        return Inserted(dict(inputs), request)
    inputs = dict(inputs)
    if inputs.get("inputs") is not None:
        inputs["input_ids"] = inputs.pop("inputs")
    ids, mask, cache = (inputs.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
    _check(inputs, ids, mask)
    assert isinstance(ids, Tensor), "checked"
    continues = not generates and cache is not None and int(cache.get_seq_length()) > 0
    if continues:
        if mask is not None:
            inputs["attention_mask"] = Insertion.before(mask.bool(), count).into(mask, 1)
        return Inserted(inputs, request)
    where = Insertion.before(torch.ones_like(ids) if mask is None else mask, count)
    fills = {"input_ids": token, "attention_mask": 1, "labels": -100}
    for name, value in inputs.items():
        if _is_of_tokens(name, value, ids):
            inputs[name] = where.into(value, fills.get(name, 0))
    _lengthen(inputs, count)
    prompt = request.prompt_mask
    if prompt is not None and prompt.shape == ids.shape:
        prompt = where.into(prompt, 0)
    request = replace(request, prompt_mask=prompt, inserted=where.positions)
    return Inserted(inputs, request, where, isinstance(inputs.get("logits_to_keep"), Tensor))


def _check(inputs: Mapping[str, Any], ids: Any, mask: Any) -> None:
    given = [name for name in _REFUSED if inputs.get(name) is not None]
    if given or not isinstance(ids, Tensor) or inputs.get("return_dict") is False:
        raise ValueError(
            f"adapters of this mixture insert tokens before each row, so it takes input_ids and counts positions "
            f"itself; got {', '.join(given) or 'no input_ids, or return_dict=False'}"
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise ValueError(f"attention_mask is no (B, T), into which tokens could be inserted, but {type(mask).__name__}")


def _is_of_tokens(name: str, value: Any, ids: Tensor) -> bool:
    """Tell whether an input holds whole numbers of each token."""
    if not isinstance(value, Tensor) or value.is_floating_point() or name.startswith(_NOT_OF_TOKENS):
        return False
    return value.shape[:2] == ids.shape


def _lengthen(inputs: dict[str, Any], count: int) -> None:
    """Add the inserted tokens to what the caller counts in tokens of whole sequences, or from their end."""
    for name in ("max_length", "min_length", "logits_to_keep"):
        value = inputs.get(name)
        if isinstance(value, Tensor) or value:  # of positions, those of real tokens all move by as much
            inputs[name] = value + count
    chosen = inputs.get("generation_config")
    if chosen is not None:
        inputs["generation_config"] = chosen = copy.deepcopy(chosen)
        for name in ("max_length", "min_length"):
            if getattr(chosen, name, None):
                setattr(chosen, name, getattr(chosen, name) + count)
