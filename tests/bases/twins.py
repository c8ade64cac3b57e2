"""Tiny random twins of published bases: each class built from its config, with its own processor and tokens.

A twin's tokenizer has one token a byte and the special tokens of the published one; pictures become few patches.
"""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.import_utils import is_num2words_available

from tests.bases.byte_tokenizer import byte_tokenizer
from tests.bases.recipes import RECIPES
from tests.core.zoo import ZOO

NAMES = [name for name in RECIPES if name != "smolvlm" or is_num2words_available()]
"""Twins that can be built here; SmolVLM's processor needs num2words."""


@dataclass(frozen=True)
class Twin:
    """A tiny random base.

    Args:
        name: Of its class in the zoo.
        model: In evaluation mode.
        processor: Its processor; for a base without pictures its tokenizer, for one without text its image processor.
    """

    name: str
    model: PreTrainedModel
    processor: Any


def twin(name: str) -> Twin:
    """Build a twin.

    Args:
        name: One of `NAMES`.
    """
    recipe, (kind, make) = RECIPES[name], ZOO[name]
    config = make()
    if not recipe.named:  # no text
        return Twin(name, _random(kind, config), recipe.processor(None, None))
    tokenizer = byte_tokenizer(recipe.named, recipe.others, recipe.start, recipe.end)
    if recipe.processor is None:
        tokenizer.chat_template = recipe.chat
        processor: Any = tokenizer
    else:
        processor = recipe.processor(tokenizer, recipe.chat)
    _agree(config, tokenizer, processor)
    return Twin(name, _random(kind, config), processor)


def _agree(config: Any, tokenizer: PreTrainedTokenizerFast, processor: Any) -> None:
    """Give a config the tokens of a tokenizer, and room for prompts of bytes."""
    text = config.get_text_config()
    text.vocab_size = len(tokenizer)
    for each in (config, text):
        for name in ("pad", "bos", "eos"):
            setattr(each, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    for name in ("image_token", "video_token"):
        token = getattr(tokenizer, name, getattr(processor, name, None))
        for attribute in (f"{name}_id", f"{name}_index"):
            if hasattr(config, attribute) and token is not None:
                setattr(config, attribute, tokenizer.convert_tokens_to_ids(str(token)))
    for room in ("max_position_embeddings", "n_positions"):
        if hasattr(text, room):
            setattr(text, room, 1024)


def _random(kind: str, config: Any) -> PreTrainedModel:
    """Build a model with weights at which a wrong row, picture or token shows."""
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, kind)(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or parameter.numel() == 1 or name.endswith("image_newline"):  # gates would be shut
            nn.init.normal_(parameter, std=0.2)
    return model.eval()
