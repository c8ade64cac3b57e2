"""A tokenizer with one token a byte, and with the special tokens of any published one."""

from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_OWN = ("pad_token", "bos_token", "eos_token", "unk_token", "cls_token", "sep_token", "mask_token")


def byte_tokenizer(
    named: Mapping[str, str], others: Sequence[str] = (), start: Sequence[str] = (), end: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Build it.

    Args:
        named: Special tokens by what they are for, such as `pad_token` or `image_token`; ids from 0 on.
        others: Further special tokens.
        start: Special tokens that it puts before a text.
        end: Special tokens that it puts behind a text.
    """
    specials = list(dict.fromkeys([*named.values(), *others]))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({token: i for i, token in enumerate([*specials, *letters])}, []))
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    if start or end:
        around = [(token, specials.index(token)) for token in dict.fromkeys([*start, *end])]
        built.post_processor = processors.TemplateProcessing(
            single=[*start, "$A", *end], pair=[*start, "$A", *end, "$B", *end], special_tokens=around
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        extra_special_tokens={name: token for name, token in named.items() if name not in _OWN},
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in named.items() if name in _OWN},
    )
