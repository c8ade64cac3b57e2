"""Tokens that adapters put before each row's first real token.

They are inserted into what the caller gave, as real tokens to the base, so that positions, masks, caches and beams need
nothing else; a bank at the entry of the language tower puts its own vectors in their place, and what comes out of the
base is cut back to the caller's tokens, see `moadapt.insertion`. Axes: B rows, T tokens of the caller, n inserted
tokens.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from moadapt.adapters.bank import Adapter
from moadapt.call import Request
from moadapt.insertion import Inserted, Insertion

_NOT_OF_TOKENS = ("pixel", "image", "video")
_POSITIONS = ("start_positions", "end_positions")
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


class _Streamer(BaseStreamer):
    """Hands a caller's streamer the caller's own prompt, and then new tokens as they come."""

    def __init__(self, inner: BaseStreamer, where: Insertion) -> None:
        self.inner, self.where = inner, where

    def put(self, value: Tensor) -> None:
        """Take the prompt, (B, T + n), or one new token a row, (B,)."""
        self.inner.put(self.where.out_of_sequences(value) if value.ndim > 1 else value)

    def end(self) -> None:
        """Tell that there are no more."""
        self.inner.end()


def insert(
    inputs: Mapping[str, Any],
    request: Request,
    count: int,
    token: int,
    *,
    generates: GenerationConfig | None = None,
) -> Inserted:
    """Insert tokens into what the base is called with; a filled cache holds them already, and then only masks grow.

    Args:
        inputs: What the caller gave.
        request: What the caller said.
        count: n; 0 changes nothing.
        token: What to insert.
        generates: The base's own settings where it is `generate` that is called, which cuts off itself what a cache
            holds; else None.

    Raises:
        ValueError: The inputs are no token ids, or tell positions, which the inserted tokens would shift; or
            attentions are asked of single steps, whose keys cannot be told apart.
    """
    if not count:
        return Inserted(dict(inputs), request)
    inputs = dict(inputs)
    if inputs.get("inputs") is not None:
        inputs["input_ids"] = inputs.pop("inputs")
    ids, mask, cache = (inputs.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
    _check(inputs, ids, mask)
    assert isinstance(ids, Tensor), "checked"
    continues = generates is None and cache is not None and int(cache.get_seq_length()) > 0
    if continues or generates is not None:
        _refuse_attentions(inputs, generates)
    if continues:
        if mask is not None:
            inputs["attention_mask"] = Insertion.before(mask, count).into(mask, 1)
        return Inserted(inputs, request)
    where = Insertion.before(torch.ones_like(ids) if mask is None else mask, count)
    fills = {"input_ids": token, "attention_mask": 1, "labels": -100, "shift_labels": -100}
    for name, value in inputs.items():
        if _is_of_tokens(name, value, ids):
            inputs[name] = where.into(value, fills.get(name, 0))
        elif name in _POSITIONS and isinstance(value, Tensor):
            inputs[name] = where.moved(value)
    _lengthen(inputs, count, generates)
    if inputs.get("streamer") is not None:
        inputs["streamer"] = _Streamer(inputs["streamer"], where)
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


def _refuse_attentions(inputs: Mapping[str, Any], generates: GenerationConfig | None) -> None:
    name = "output_attentions"
    if inputs.get(name) or any(getattr(each, name, None) for each in (inputs.get("generation_config"), generates)):
        raise ValueError(
            "adapters of this mixture insert tokens before each row, which cannot be left out of the attentions of "
            "single steps; leave output_attentions unset, or run the whole rows without a cache"
        )


def _is_of_tokens(name: str, value: Any, ids: Tensor) -> bool:
    """Tell whether an input holds numbers of each token: whole ones, or how far it may be attended to."""
    if not isinstance(value, Tensor) or name.startswith(_NOT_OF_TOKENS):
        return False
    return value.shape[:2] == ids.shape and (name == "attention_mask" or not value.is_floating_point())


def _lengthen(inputs: dict[str, Any], count: int, defaults: GenerationConfig | None) -> None:
    """Add the inserted tokens to what counts tokens of whole sequences, or from their end."""
    keep = inputs.get("logits_to_keep")
    if isinstance(keep, Tensor):  # of positions from the front, those of real tokens all move by as much
        inputs["logits_to_keep"] = torch.where(keep >= 0, keep + count, keep)
    elif keep:
        inputs["logits_to_keep"] = keep + count
    chosen = inputs.get("generation_config")
    if chosen is not None:
        inputs["generation_config"] = chosen = copy.deepcopy(chosen)
    for name, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if inputs.get(name):
            inputs[name] += count
        elif getattr(chosen, name, None):
            setattr(chosen, name, getattr(chosen, name) + count)
        elif getattr(defaults, name, None) and not (
            inputs.get(instead) or getattr(chosen, instead, None) or getattr(defaults, instead, None)
        ):
            longer = getattr(defaults, name) + count
            if chosen is None:
                inputs[name] = longer
            else:
                setattr(chosen, name, longer)
