"""Tiny random models of many transformers classes, built from configs alone."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from tests.models import IMAGE_TOKEN

TEXT: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def config(kind: str, **fields: Any) -> Any:
    return AutoConfig.for_model(kind, **fields)


def build(name: str) -> PreTrainedModel:
    """Build the model of a name in `ZOO`, with random weights."""
    kind, make = ZOO[name]
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, kind)(make())
    return model.eval()


def _llava(vision: Any, **fields: Any) -> Any:
    return config(
        "llava",
        vision_config=vision,
        text_config=config("llama", **TEXT),
        image_token_id=3,
        image_seq_length=4,
        **fields,
    )


GRIDS = [[16, 16], [16, 32], [32, 16], [32, 32]]
"""Sizes to which a picture may be cut into tiles, in pixels."""


def _llava_next() -> Any:
    return config(
        "llava_next",
        vision_config=config("clip_vision_model", **VISION),
        text_config=config("llama", **TEXT),
        image_token_id=3,
        image_grid_pinpoints=GRIDS,
        image_seq_length=4,
    )


def _llava_onevision() -> Any:
    return config(
        "llava_onevision",
        vision_config=config("siglip_vision_model", **VISION),
        text_config=config("qwen2", **TEXT),
        image_token_id=3,
        video_token_id=4,
        vision_feature_layer=-1,
        image_grid_pinpoints=GRIDS,
    )


def _qwen25_vl() -> Any:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    text = {**TEXT, "rope_parameters": ROPE}
    return config("qwen2_5_vl", text_config=text, vision_config=vision, image_token_id=3, video_token_id=4)


def _qwen3_vl() -> Any:
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 16,
    }
    text = {**TEXT, "rope_parameters": ROPE}
    return config("qwen3_vl", text_config=text, vision_config=vision, image_token_id=3, video_token_id=4)


def _paligemma() -> Any:
    vision = config("siglip_vision_model", **VISION, projection_dim=32, vision_use_head=False)
    return config(
        "paligemma", vision_config=vision, text_config=config("gemma", **TEXT), image_token_id=3, projection_dim=32
    )


def _gemma3() -> Any:
    vision = config("siglip_vision_model", **VISION, vision_use_head=False)
    return config(
        "gemma3",
        vision_config=vision,
        text_config=config("gemma3_text", **TEXT),
        mm_tokens_per_image=4,
        image_token_index=3,
    )


def _idefics3(kind: str) -> Any:
    vision = {**VISION, "num_channels": 3}
    return config(kind, vision_config=vision, text_config=config("llama", **TEXT), image_token_id=3, scale_factor=2)


def _internvl() -> Any:
    vision = config("internvl_vision", **{**VISION, "image_size": [16, 16], "patch_size": [8, 8]})
    return config("internvl", vision_config=vision, text_config=config("qwen2", **TEXT), image_token_id=3)


def _mllama() -> Any:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "max_num_tiles": 2,
        "intermediate_layers_indices": [0, 2],
        "vision_output_dim": 96,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    text = {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    return config("mllama", vision_config=vision, text_config=text, image_token_index=66)


def _blip2() -> Any:
    qformer = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "encoder_hidden_size": 24,
        "vocab_size": 67,
    }
    text = config(
        "opt", vocab_size=67, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return config(
        "blip-2",
        vision_config=VISION,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=4,
        image_token_index=3,
    )


def _florence2() -> Any:
    text = config(
        "bart", vocab_size=67, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=128, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    vision = {
        "embed_dim": [8, 16, 16, 32],
        "num_heads": [2, 2, 2, 2],
        "num_groups": [2, 2, 2, 2],
        "depths": [1, 1, 1, 1],
        "window_size": 4,
        "projection_dim": 32,
        "max_temporal_embeddings": 4,
        "max_position_embeddings": 8,
    }
    return config("florence2", vision_config=vision, text_config=text, image_token_id=3)


def _t5() -> Any:
    return config(
        "t5", vocab_size=67, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip


def _gpt2() -> Any:
    return config(
        "gpt2", vocab_size=67, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    )


BERT = {name: value for name, value in TEXT.items() if name not in ("num_key_value_heads", "head_dim")}

ZOO: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("LlamaForCausalLM", lambda: config("llama", **TEXT)),
    "qwen3": ("Qwen3ForCausalLM", lambda: config("qwen3", **TEXT)),
    "gpt2": ("GPT2LMHeadModel", _gpt2),
    "bert": ("BertForSequenceClassification", lambda: config("bert", **BERT)),
    "vit": ("ViTForImageClassification", lambda: config("vit", **VISION)),
    "dinov2": ("Dinov2ForImageClassification", lambda: config("dinov2", **VISION)),
    "t5": ("T5ForConditionalGeneration", _t5),
    "llava": (
        "LlavaForConditionalGeneration",
        lambda: _llava(config("clip_vision_model", **VISION), vision_feature_layer=-2),
    ),
    "llava_pixtral": (
        "LlavaForConditionalGeneration",
        lambda: _llava(config("pixtral", **VISION), vision_feature_layer=-1, vision_feature_select_strategy="full"),
    ),
    "llava_next": ("LlavaNextForConditionalGeneration", _llava_next),
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration", _llava_onevision),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", _qwen25_vl),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", _qwen3_vl),
    "paligemma": ("PaliGemmaForConditionalGeneration", _paligemma),
    "gemma3": ("Gemma3ForConditionalGeneration", _gemma3),
    "idefics3": ("Idefics3ForConditionalGeneration", lambda: _idefics3("idefics3")),
    "smolvlm": ("SmolVLMForConditionalGeneration", lambda: _idefics3("smolvlm")),
    "internvl": ("InternVLForConditionalGeneration", _internvl),
    "mllama": ("MllamaForConditionalGeneration", _mllama),
    "blip2": ("Blip2ForConditionalGeneration", _blip2),
    "florence2": ("Florence2ForConditionalGeneration", _florence2),
}


def batch_of(name: str) -> dict[str, Tensor]:
    """Two rows for a base of the zoo, one image each; the rows have different tokens and pixels."""
    patches = {"qwen2_5_vl": 1, "internvl": 1, "idefics3": 1, "smolvlm": 1}.get(name, 4)
    text = torch.randint(5, 60, (2, 3))
    ids = torch.cat([torch.full((2, patches), IMAGE_TOKEN), text], dim=1)
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    if name in ("idefics3", "smolvlm"):
        batch["pixel_values"] = batch["pixel_values"].unsqueeze(1)
    if name in ("paligemma", "gemma3"):
        batch["token_type_ids"] = (ids == IMAGE_TOKEN).long()
    if name == "qwen2_5_vl":
        batch["pixel_values"] = torch.randn(8, 3 * 2 * 14 * 14)
        batch["image_grid_thw"] = torch.tensor([[1, 2, 2]] * 2)
        batch["mm_token_type_ids"] = (ids == IMAGE_TOKEN).long()
    return batch
