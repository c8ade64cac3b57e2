"""The small LLaVA of the digit scenes: architecture, tokenizer and processor, no weights.

CLIP vision tower, two-layer projector, Llama language model, all of transformers' own classes. The tokenizer is a
byte-level BPE, so no text is unknown to it.
"""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from moadapt_tasks.digit_scenes.scenes import SIZE

PATCH = 8
VOCABULARY = 1024
_PAD, _END, _IMAGE = "<pad>", "<eos>", "<image>"
_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'][0]['text'] }}<eos>"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{{ '\n' }}{% endif %}{% endfor %}"
)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE.

    Args:
        texts: What to take the merges from.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = [_PAD, _END, _IMAGE]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        extra_special_tokens={"image_token": _IMAGE},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, side: int = SIZE) -> LlavaProcessor:
    """Return the processor: square images cut into 8-pixel patches, beside the tokenizer.

    Args:
        tokenizer: Of the texts.
        side: Of an image, in pixels; a multiple of 8.
    """
    images = CLIPImageProcessorPil(
        size={"height": side, "width": side},
        do_center_crop=False,
        image_mean=[0.25] * 3,
        image_std=[0.25] * 3,
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT,
    )


def build_config(tokenizer: PreTrainedTokenizerFast, side: int = SIZE, width: int = 128) -> LlavaConfig:
    """Return the architecture, about 1.8 million parameters at its own width.

    Args:
        tokenizer: Of the texts.
        side: Of an image, in pixels; a multiple of 8.
        width: Of both towers; a multiple of 4.
    """
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=side,
        patch_size=PATCH,
        projection_dim=width,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    make: Any = LlavaConfig  # its stub knows neither the token ids nor the fields that every config takes
    config: LlavaConfig = make(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(_IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(side // PATCH) ** 2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return config


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Return the base with random weights."""
    return LlavaForConditionalGeneration(build_config(tokenizer))
