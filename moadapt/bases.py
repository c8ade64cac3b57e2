"""Where a base comes from: a folder, a hub name, or one that a package ships under a short name."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from moadapt.processors import load_processor
from moadapt.quantised import is_quantised
from moadapt.quantising import keep_packed, quantisation
from moadapt.registry import BASES

_LOADERS: tuple[tuple[Any, Any], ...] = (
    (AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    (AutoModelForSequenceClassification, modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    (AutoModelForImageClassification, modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
)
"""Kinds of models, and the classes of each by the type that a config names; the first that fits counts."""


class ShippedBase(ABC):
    """A base that a package ships, with a recipe to make one like it."""

    @abstractmethod
    def folder(self) -> Path:
        """Return the transformers folder: config, weights, processor."""

    @abstractmethod
    def pretrain(self, out: Path, work: Path, **settings: int | float) -> None:
        """Make the weights again.

        Args:
            out: Folder to write.
            work: Folder for checkpoints; a second call resumes there.
            settings: Numbers of the recipe to change.
        """


def base_folder(name: str) -> str:
    """Return what `from_pretrained` should read for a base's name.

    Args:
        name: A registered short name, a folder or a hub name.
    """
    if "/" not in name and not Path(name).exists() and name in BASES:
        return str(BASES.get(name)().folder())
    return name


def load_base(
    name: str,
    *,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    quantize: str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load a base and its processor.

    Args:
        name: A registered short name, a folder or a hub name.
        dtype: Number type of the weights, of quantised ones that of the activations; `auto` takes the file's own.
        attn_implementation: One of transformers' attention kernels.
        quantize: How to quantise the linear layers: `int8` or `int4` by torchao, `nf4` or `llm_int8` by bitsandbytes;
            None loads them as they were written, which may be quantised.

    Returns:
        The model in evaluation mode, and its processor.

    Raises:
        ValueError: transformers found no model of that name or cannot quantise it, the number type, kernel or way to
            quantise is unknown, or the library for it is not installed.
    """
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype is {dtype!r}; give auto, or a number type of torch such as float32 or bfloat16")
    folder = base_folder(name)
    with _loading(name):
        config = AutoConfig.from_pretrained(folder)
    options = {} if quantize is None else {"quantization_config": _quantisation(quantize, dtype, config)}
    with _loading(name):
        loader = _loader(config)
        model = loader.from_pretrained(folder, dtype=dtype, attn_implementation=attn_implementation, **options)
        processor = load_processor(folder, config)
    if quantize is not None and not any(is_quantised(module) for module in model.modules()):
        raise ValueError(f"{quantize} finds no linear layer to quantise in {name!r}; choose another way to quantise")
    keep_packed(model)
    return model.eval(), processor


def outline(
    name: str, *, device: str = "meta", dtype: str = "auto", attn_implementation: str | None = None
) -> PreTrainedModel:
    """Build a base from its config alone, on the meta device without weights.

    Args:
        name: A registered short name, a folder or a hub name.
        device: Another one, where the caller sees to it that weights take no memory.
        dtype: Number type of the weights; `auto` takes the config's own.
        attn_implementation: One of transformers' attention kernels.

    Raises:
        ValueError: transformers found no config of that name.
    """
    with _loading(name), torch.device(device):
        config = AutoConfig.from_pretrained(base_folder(name))
        chosen = getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32
        options = {"dtype": chosen, "attn_implementation": attn_implementation}
        model: PreTrainedModel = _loader(config).from_config(config, **options)
    model.eval()
    return model


def decoder_start(config: PreTrainedConfig) -> int | None:
    """Return the token that the decoder of an encoder-decoder begins with; None for other bases.

    Args:
        config: Of the base.
    """
    if not config.is_encoder_decoder:
        return None
    start: int | None = config.get_text_config().decoder_start_token_id
    return start


def class_names(config: PreTrainedConfig) -> tuple[str, ...] | None:
    """Return the names of the classes that a base tells rows apart by, in the order of its logits; None for others.

    Args:
        config: Of the base.

    Raises:
        ValueError: Its head gives numbers, or several classes a row.
    """
    if _loader(config) not in (AutoModelForSequenceClassification, AutoModelForImageClassification):
        return None
    kind = getattr(config, "problem_type", None)
    names: dict[Any, str] = dict(config.id2label or {})
    if kind not in (None, "single_label_classification") or len(names) < 2:
        raise ValueError(
            f"this base's head is for {kind or 'regression'} with {len(names)} outputs; adapters are trained where it "
            "tells one of several classes a row"
        )
    return tuple(str(names[index]) for index in sorted(names))


def _loader(config: Any) -> Any:
    """Choose the kind of model whose class wrote the weights, or else the first that takes such a config."""
    known = {loader: names[config.model_type] for loader, names in _LOADERS if config.model_type in names}
    wrote = [loader for loader, name in known.items() if name in (config.architectures or ())]
    return next(iter([*wrote, *known]), AutoModelForCausalLM)


def _quantisation(name: str, dtype: torch.dtype | str, config: PreTrainedConfig) -> Any:
    """Return the config that quantises plain weights."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"the base was written quantised, so it cannot be quantised to {name}; leave quantize out")
    chosen = config.dtype if dtype == "auto" else dtype
    return quantisation(name, getattr(torch, chosen) if isinstance(chosen, str) else chosen)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Say what bases there are where one cannot be loaded."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the base {name!r} cannot be loaded; give a folder, a hub name, or one of those shipped: "
            f"{', '.join(BASES.names())}. transformers says: {error}"
        ) from error
