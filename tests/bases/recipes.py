"""What each twin needs besides its config: its processor and the special tokens of the published tokenizer.

Where a class wants a video processor, which transformers builds with torchvision alone, `NoVideos` stands in. LLaVA on
a Pixtral tower has LLaVA's processor and Pixtral's image processor, since Pixtral's own needs torchvision; the pictures
of a batch must be of one size there. SmolVLM's processor needs num2words.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from moadapt.processors import NoVideos, without_videos
from tests.bases import chat_templates as chats
from tests.core.zoo import GRIDS

Tokens = PreTrainedTokenizerFast
Make = Callable[[Tokens, str | None], Any]
SQUARE = {"height": 16, "width": 16}
CROP: dict[str, Any] = {"size": {"shortest_edge": 16}, "crop_size": SQUARE}


@dataclass(frozen=True)
class Recipe:
    """What a twin needs besides its config.

    Args:
        processor: Makes the processor of a tokenizer; None where the tokenizer is all.
        named: Special tokens by what they are for.
        others: Further special tokens.
        start: Special tokens that the tokenizer puts before a text.
        end: Special tokens that it puts behind a text.
        chat: The chat template, where the class has one.
    """

    processor: Callable[[PreTrainedTokenizerFast, str | None], Any] | None
    named: Mapping[str, str] = field(default_factory=dict)
    others: Sequence[str] = ()
    start: Sequence[str] = ()
    end: Sequence[str] = ()
    chat: str | None = None


def _llava(tokens: Tokens, chat: str | None) -> Any:
    return transformers.LlavaProcessor(
        CLIPImageProcessorPil(**CROP),
        tokens,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat,
    )


def _llava_pixtral(tokens: Tokens, chat: str | None) -> Any:
    images = PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
    return transformers.LlavaProcessor(
        images, tokens, patch_size=8, vision_feature_select_strategy="full", chat_template=chat
    )


def _llava_next(tokens: Tokens, chat: str | None) -> Any:
    return transformers.LlavaNextProcessor(
        LlavaNextImageProcessorPil(**CROP, image_grid_pinpoints=GRIDS),
        tokens,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat,
    )


def _llava_onevision(tokens: Tokens, chat: str | None) -> Any:
    return without_videos(transformers.LlavaOnevisionProcessor)(
        LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=GRIDS),
        tokens,
        NoVideos(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=chat,
    )


def _qwen(kind: str, patch: int) -> Make:
    least = (2 * patch) ** 2
    size = {"shortest_edge": least, "longest_edge": 4 * least}

    def make(tokens: Tokens, chat: str | None) -> Any:
        images = Qwen2VLImageProcessorPil(size=size, patch_size=patch)
        videos = NoVideos(video_processor_type="Qwen2VLVideoProcessor", patch_size=patch, min_frames=4)
        return without_videos(getattr(transformers, kind))(images, tokens, videos, chat_template=chat)

    return make


def _paligemma(tokens: Tokens, chat: str | None) -> Any:
    return transformers.PaliGemmaProcessor(SiglipImageProcessorPil(size=SQUARE, image_seq_length=4), tokens)


def _gemma3(tokens: Tokens, chat: str | None) -> Any:
    return transformers.Gemma3Processor(
        Gemma3ImageProcessorPil(size=SQUARE), tokens, chat_template=chat, image_seq_length=4
    )


TILES = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}


def _idefics3(tokens: Tokens, chat: str | None) -> Any:
    return transformers.Idefics3Processor(
        Idefics3ImageProcessorPil(**TILES), tokens, image_seq_len=1, chat_template=chat
    )


def _smolvlm(tokens: Tokens, chat: str | None) -> Any:
    return without_videos(transformers.SmolVLMProcessor)(
        SmolVLMImageProcessorPil(**TILES), tokens, NoVideos(), image_seq_len=1, chat_template=chat
    )


def _internvl(tokens: Tokens, chat: str | None) -> Any:
    images = GotOcr2ImageProcessorPil(size=SQUARE, max_patches=3)
    return without_videos(transformers.InternVLProcessor)(
        images, tokens, NoVideos(), image_seq_length=1, chat_template=chat
    )


def _mllama(tokens: Tokens, chat: str | None) -> Any:
    return transformers.MllamaProcessor(MllamaImageProcessorPil(size=SQUARE, max_image_tiles=2), tokens, chat)


def _blip2(tokens: Tokens, chat: str | None) -> Any:
    return transformers.Blip2Processor(BlipImageProcessorPil(size=SQUARE), tokens, num_query_tokens=4)


def _florence2(tokens: Tokens, chat: str | None) -> Any:
    images = CLIPImageProcessorPil(
        size={"height": 64, "width": 64}, do_center_crop=False, image_seq_length=5
    )  # of 2 by 2 patches and their mean
    return transformers.Florence2Processor(images, tokens)


LLAMA = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
QWEN = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
GEMMA = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
LLAMA3 = {
    "pad_token": "<|finetune_right_pad_id|>",
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|eot_id|>",
}
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>")
QWEN_VL = {**QWEN, "image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
VISION = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>")
IDEFICS = {
    "pad_token": "<|im_end|>", "bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>",
    "image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
}  # fmt: skip
GRID = [f"<row_{row}_col_{col}>" for row in range(1, 3) for col in range(1, 3)]
BERT = {
    "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
}  # fmt: skip

RECIPES: dict[str, Recipe] = {
    "llama": Recipe(None, LLAMA3, HEADERS, start=("<|begin_of_text|>",), chat=chats.LLAMA),
    "gpt2": Recipe(None, {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}),
    "t5": Recipe(None, {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, end=("</s>",)),
    "bert": Recipe(None, BERT, start=("[CLS]",), end=("[SEP]",)),
    "vit": Recipe(lambda tokens, chat: ViTImageProcessorPil(size=SQUARE)),
    "dinov2": Recipe(lambda tokens, chat: BitImageProcessorPil(**CROP)),
    "llava": Recipe(_llava, {**LLAMA, "image_token": "<image>"}, start=("<s>",), chat=chats.LLAVA),
    "llava_next": Recipe(_llava_next, {**LLAMA, "image_token": "<image>"}, start=("<s>",), chat=chats.LLAVA_NEXT),
    "llava_pixtral": Recipe(
        _llava_pixtral, {**LLAMA, "image_token": "[IMG]"}, ("[INST]", "[/INST]"), start=("<s>",), chat=chats.PIXTRAL
    ),
    "llava_onevision": Recipe(
        _llava_onevision,
        {**QWEN, "image_token": "<image>", "video_token": "<video>"},
        ("<|im_start|>",),
        chat=chats.LLAVA_ONEVISION,
    ),
    "qwen2_5_vl": Recipe(_qwen("Qwen2_5_VLProcessor", 14), QWEN_VL, VISION, chat=chats.QWEN25_VL),
    "qwen3_vl": Recipe(_qwen("Qwen3VLProcessor", 16), QWEN_VL, VISION, chat=chats.QWEN3_VL),
    "paligemma": Recipe(_paligemma, {**GEMMA, "image_token": "<image>"}),
    "gemma3": Recipe(
        _gemma3,
        {
            **GEMMA,
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        ("<start_of_turn>", "<end_of_turn>"),
        start=("<bos>",),
        chat=chats.GEMMA3,
    ),
    "idefics3": Recipe(_idefics3, IDEFICS, GRID, start=("<|im_start|>",), chat=chats.IDEFICS3),
    "smolvlm": Recipe(_smolvlm, IDEFICS, GRID, chat=chats.IDEFICS3),
    "internvl": Recipe(
        _internvl,
        {
            **QWEN,
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        ("<|im_start|>", "<ref>", "</ref>", "<box>", "</box>"),
        chat=chats.INTERNVL,
    ),
    "mllama": Recipe(
        _mllama, {**LLAMA3, "image_token": "<|image|>"}, HEADERS, start=("<|begin_of_text|>",), chat=chats.MLLAMA
    ),
    "blip2": Recipe(
        _blip2,
        {"pad_token": "<pad>", "bos_token": "</s>", "eos_token": "</s>"},
        start=("</s>",),
    ),
    "florence2": Recipe(
        _florence2,
        {**LLAMA, "mask_token": "<mask>", "image_token": "<image>"},
        [f"<loc_{place}>" for place in range(1000)],
        start=("<s>",),
        end=("</s>",),
    ),
}
