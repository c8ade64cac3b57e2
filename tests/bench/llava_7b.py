"""Training speed and memory of a mixture on a model shaped like LLaVA-1.5-7B, beside one LoRA of the peft library.

    python tests/bench/llava_7b.py --device cuda                       # a GPU of 80 GB
    python tests/bench/llava_7b.py --size tiny --device cpu --rounds 2  # whether it runs

The weights are random and in bfloat16. Every variant adapts all linear layers of the language tower at rank 16: a
shared LoRA and eight experts behind a router, and peft's single LoRA, each on the same batch of one picture a row,
whose last tokens are the answer. A step is forward, backward and AdamW, with gradient checkpointing where
`--checkpointing` is given. The one base carries the variants by turns; a turn warms up, then times some steps by the
clock, the device waited for. Printed are tokens a second (pictures' tokens included), the median over turns of paired
ratios to peft, and the peak of memory in a turn, the base included (on a CPU not measured).
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

import moadapt
from moadapt.adapters import LoRA
from moadapt.router import RouterSpec
from moadapt_routers import ByTask, Softmax, TopK

RANK, EXPERTS, VOCABULARY, IMAGE = 16, 8, 32064, 32000
LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TASKS = [f"task{index}" for index in range(EXPERTS)]
REFERENCE = "peft LoRA"
SIZES = {
    "7b": ({"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "image_size": 336, "patch_size": 14, "projection_dim": 768},
           {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}),
    "tiny": ({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14, "projection_dim": 32},
             {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}),
}  # fmt: skip
"""Settings of the vision tower and of the language tower."""


def base_of(size: str, device: torch.device) -> PreTrainedModel:
    """Return a frozen model with random weights."""
    vision, text = SIZES[size]
    text_config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096, **text)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**vision), text_config=text_config, image_token_id=IMAGE)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def batch_of(model: PreTrainedModel, rows: int, text: int) -> dict[str, Tensor]:
    """Return rows of a picture and text, the second half of which is the answer.

    Args:
        model: The base.
        rows: B.
        text: Tokens of a row beside those of its picture.
    """
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, IMAGE, (rows, text), generator=generator)
    ids = torch.cat([torch.full((rows, patches), IMAGE), words], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, patches + text // 2 :] = words[:, text // 2 :]
    pixels = torch.randn(rows, 3, vision.image_size, vision.image_size, generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch["pixel_values"] = pixels.to(torch.bfloat16)
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


@contextmanager
def with_peft(base: PreTrainedModel, checkpointing: bool) -> Iterator[nn.Module]:
    """Put peft's LoRA on the base."""
    paths = [name for name, module in base.named_modules() if "language_model" in name and name.endswith(tuple(LEAVES))]
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=paths)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).train()
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield model
    finally:
        if checkpointing:
            base.gradient_checkpointing_disable()
        model.unload()


@contextmanager
def with_mixture(base: PreTrainedModel, checkpointing: bool, router: RouterSpec) -> Iterator[nn.Module]:
    """Put a shared adapter, experts and a router on the base."""
    lora = LoRA(rank=RANK, alpha=RANK)
    model = moadapt.attach(base, shared=lora, experts=dict.fromkeys(TASKS, lora), router=router)
    model.to(torch.bfloat16).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    try:
        yield model
    finally:
        model.detach()


Variant = Callable[[PreTrainedModel, bool], Any]
VARIANTS: dict[str, Variant] = {
    REFERENCE: with_peft,
    "shared + 8, by task": partial(with_mixture, router=ByTask()),
    "shared + 8, top-2 by sequence": partial(with_mixture, router=TopK(k=2)),
    "shared + 8, dense by sequence": partial(with_mixture, router=Softmax()),
    "shared + 8, top-2 by token": partial(with_mixture, router=TopK(k=2, scope="token")),
}


def turn(base: PreTrainedModel, variant: Variant, batch: dict[str, Tensor], steps: int, checkpointing: bool) -> Any:
    """Return tokens a second and the peak of memory in bytes of some steps."""
    with variant(base, checkpointing) as model:
        told = {"task": [TASKS[row % EXPERTS] for row in range(len(batch["labels"]))]}
        inputs = {**batch, **(told if isinstance(model, moadapt.Mixture) else {})}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        starts = []
        if base.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for step in range(steps + 2):  # two warm up
            if step == 2:
                _wait(base.device)
                starts.append(time.perf_counter())
            model(**inputs, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        _wait(base.device)
        seconds = time.perf_counter() - starts[0]
    peak = torch.cuda.max_memory_allocated() if base.device.type == "cuda" else 0
    return batch["input_ids"].numel() * steps / seconds, peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Print one line a variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--text", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true")
    given = parser.parse_args()
    base = base_of(given.size, torch.device(given.device))
    batch = batch_of(base, given.rows, given.text)
    rounds = [
        {name: turn(base, variant, batch, given.steps, given.checkpointing) for name, variant in VARIANTS.items()}
        for _ in range(given.rounds)
    ]
    name = torch.cuda.get_device_name() if base.device.type == "cuda" else "CPU"
    print(f"{name}, {sum(p.numel() for p in base.parameters()):,} parameters, {tuple(batch['input_ids'].shape)} tokens")
    for variant in VARIANTS:
        speed = statistics.median(each[variant][0] for each in rounds)
        ratio = statistics.median(each[variant][0] / each[REFERENCE][0] for each in rounds)
        memory = max(each[variant][1] for each in rounds) / 2**30
        print(f"{variant}: {speed:,.0f} tokens/s, {ratio:.2f} of peft, peak {memory:.1f} GiB")


if __name__ == "__main__":
    main()
