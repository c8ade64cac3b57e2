"""A task of a few coloured pictures, and a tiny random LLaVA with a byte-level processor, all made on the fly."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torchmetrics import Metric
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from moadapt.picture import Picture
from moadapt.task import BadExample, Example, Task

COLORS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'][0]['text'] }}<eos>{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '\n' }}{% endif %}{% endfor %}"
)


class Exact(Metric):
    """Share of rows whose prediction is the reference."""

    right: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: list[str], references: list[str]) -> None:
        self.right += sum(p == r for p, r in zip(predictions, references, strict=True))
        self.rows += len(predictions)

    def compute(self) -> Tensor:
        return self.right / self.rows


@dataclass(frozen=True, kw_only=True)
class Colour(Task):
    """Names the colour of a picture.

    Args:
        root: Folder of pictures; made when read.
        question: The prompt.
        rows: Rows of each split.
        max_new_tokens: Longest answer.
        broken: How many entries are reported as unusable.
        upper: Whether answers are in capitals, so that two tasks want different things.
        blind: Whether rows have no picture.
    """

    root: str
    question: str = "colour?"
    rows: int = 6
    max_new_tokens: int = 8
    broken: int = 0
    upper: bool = False
    blind: bool = False
    primary: ClassVar[str] = "exact"

    def read(self, split: str) -> tuple[list[Example], list[BadExample]]:
        folder = Path(self.root)
        folder.mkdir(parents=True, exist_ok=True)
        examples = []
        for row in range(self.rows):
            name = list(COLORS)[row % len(COLORS)]
            file = folder / f"{split}-{row}.png"
            if not file.exists():
                _save(file, tuple(min(255, c + 5 * row) for c in COLORS[name]))
            answer = name.upper() if self.upper else name
            pictures = () if self.blind else (Picture(file, (16, 16)),)
            examples.append(Example(pictures, self.question, (answer,), answer, f"{split}: row {row}"))
        bad = [BadExample(folder / f"{split}.json", f"row {i}", "has no picture") for i in range(self.broken)]
        return examples, bad

    def parse(self, text: str, example: Example) -> str:
        return text.strip()

    def metrics(self) -> dict[str, Metric]:
        return {"exact": Exact()}


def _save(file: Path, colour: tuple[int, ...]) -> None:
    temporary = file.with_suffix(f".{os.getpid()}.png")
    Image.new("RGB", (16, 16), colour).save(temporary)
    temporary.rename(file)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    specials = ["<pad>", "<eos>", "<image>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *letters])}
    built = Tokenizer(models.BPE(vocabulary, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def processor(chat: str | None = CHAT) -> LlavaProcessor:
    """Four patches a picture."""
    images = CLIPImageProcessorPil(
        size={"height": 16, "width": 16}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        images,
        tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat,
    )


def write_base(folder: Path, **text: Any) -> str:
    """Write a tiny random LLaVA with its processor, and return the folder's name."""
    torch.manual_seed(0)
    made = processor()
    ids = made.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=len(ids), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
            **text,
        ),
        image_token_id=2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=4,
        pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():  # sizes at which a wrong row or token shows
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return str(folder)


def toy_tasks(root: Path, rows: tuple[int, int] = (6, 4), **options: Any) -> dict[str, Task]:
    """Two tasks on the same pictures that want different answers."""
    return {
        "small": Colour(root=str(root / "small"), rows=rows[0], **options),
        "large": Colour(root=str(root / "large"), rows=rows[1], question="say the COLOUR", upper=True, **options),
    }
