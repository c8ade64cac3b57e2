"""A tiny base whose widths groups of 32 divide, quantised in the ways whose libraries are installed here."""

import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moadapt.bases import load_base
from moadapt.quantising import QUANTISATIONS
from tests.bases.byte_tokenizer import byte_tokenizer

WEIGHTS_ONLY = ("int8", "int4", "nf4")
"""Ways in which only weights are quantised, so that a layer does what its dequantised weight does."""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_base(folder: Path) -> str:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer({"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}, start=("<s>",))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def quantised(folder: str, way: str, dtype: str = "float32") -> PreTrainedModel:
    """Load a base quantised; skip where the library for it is missing."""
    library = QUANTISATIONS[way][0]
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed; pip install 'moadapt[quant]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries say of torch while they are imported
        return load_base(folder, dtype=dtype, quantize=way)[0]


def weight_of(layer: nn.Module) -> Tensor:
    """The weight that a layer acts by, read off what it makes of the unit vectors."""
    width = layer.in_features
    with torch.no_grad():
        outputs, offset = layer(torch.eye(width)), layer(torch.zeros(1, width))
    return (outputs - offset).T


def dense(folder: str, base: PreTrainedModel) -> PreTrainedModel:
    """The plain base, with the weights that the layers of a quantised one act by."""
    plain, _ = load_base(folder)
    for path, module in plain.named_modules():
        if path.endswith(LINEARS):
            module.weight.data = weight_of(base.get_submodule(path))
    return plain


def batch(rows: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(3, 200, (rows, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
