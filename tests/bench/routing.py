"""What routing costs: step time and memory of mixtures, as ratios to one peft LoRA on the same work.

    python tests/bench/routing.py                      # all sizes, float32 and bfloat16
    python tests/bench/routing.py --size small --dtype float32 --rounds 15
    python tests/bench/routing.py --of experts         # routings over 8, 32, 64 and 128 experts
    python tests/bench/routing.py --of families        # every adapter family, one expert a task

Every variant adapts a Llama-shaped model; LoRAs sit at q, k, v, o, gate, up and down with rank 8, other families at
their own sites with their own defaults. Where nothing else is said there are eight experts. A step is forward and
backward of the same batch. Variants run in turn within one process on one thread; each ratio is the median over
rounds of paired CPU times. Memory is what autograd keeps for the backward pass, and the peak of tensors alive during
a step, both beyond the parameters. The table goes to the screen, the figures to a JSON file where `--out` names one.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, PolyConfig, XLoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import moadapt
from moadapt.adapters import FamilySpec, LoRA
from moadapt.registry import FAMILIES
from moadapt.router import RouterSpec
from moadapt_routers import ByTask, Softmax, TopK

RANK, EXPERTS, VOCABULARY = 8, 8, 1024
LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = LoRA(rank=RANK)
MANY = (8, 32, 64, 128)
REFERENCE = "peft LoRA"


@dataclass(frozen=True)
class Size:
    """Shape of model and batch."""

    hidden: int
    ffn: int
    rows: int
    tokens: int


SIZES = {"small": Size(256, 688, 8, 64), "large": Size(1024, 2816, 4, 128)}
Step = Callable[[], None]


def llama(size: Size, dtype: torch.dtype) -> PreTrainedModel:
    """Return four frozen blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=4,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 64,
    )
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def batch_of(size: Size) -> dict[str, Tensor]:
    """Return tokens whose second half is the answer."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (size.rows, size.tokens), generator=generator)
    labels = ids.clone()
    labels[:, : size.tokens // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def step_of(model: nn.Module, inputs: Mapping[str, Any]) -> Step:
    """Return forward and backward of one batch."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(**inputs, use_cache=False).loss.backward()

    return step


def frozen_base(size: Size, dtype: torch.dtype) -> Step:
    """Forward, and backward to the embeddings: the floor of any adapter training."""
    model = llama(size, dtype)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    return step_of(model, batch_of(size))


def mixture(
    size: Size,
    dtype: torch.dtype,
    router: RouterSpec,
    *,
    shared: bool = False,
    experts: int = EXPERTS,
    family: FamilySpec = LORA,
) -> Step:
    """Experts behind a router, with or without a shared adapter; every row has a task of its own."""
    names = [f"task{index}" for index in range(experts)]
    model = moadapt.attach(
        llama(size, dtype),
        shared=family if shared else None,
        experts=dict.fromkeys(names, family),
        router=router,
    ).to(dtype)
    _wake(model)
    if router.fits_from:
        parts = (names[start : start + size.rows] for start in range(0, experts, size.rows))
        moadapt.fit_router(model, [{**batch_of(size), "task": part} for part in parts])
    tasks = [names[row * experts // size.rows] for row in range(size.rows)]
    return step_of(model.train(), {**batch_of(size), "task": tasks})


def peft_lora(size: Size, dtype: torch.dtype) -> Step:
    """One LoRA of the peft library, its adapters in the base's dtype."""
    model = get_peft_model(llama(size, dtype), _lora(), autocast_adapter_dtype=False).to(dtype)
    _wake(model)
    return step_of(model.train(), batch_of(size))


def peft_poly(size: Size, dtype: torch.dtype) -> Step:
    """Eight skills mixed by task in parameter space."""
    config = PolyConfig(task_type="CAUSAL_LM", r=RANK, target_modules=LEAVES, n_tasks=EXPERTS, n_skills=EXPERTS)
    model = get_peft_model(llama(size, dtype), config, autocast_adapter_dtype=False).to(dtype)
    return step_of(model.train(), {**batch_of(size), "task_ids": torch.arange(size.rows)})


def peft_xlora(size: Size, dtype: torch.dtype) -> Step:
    """Eight LoRAs weighed by token; the experts train too, as a mixture's do."""
    with tempfile.TemporaryDirectory() as folder:
        adapters = {str(i): path for i, path in enumerate(_saved_loras(size, dtype, Path(folder)))}
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=size.hidden,
            adapters=adapters,
            use_trainable_adapters=True,
            xlora_depth=1,
        )
        base = llama(size, dtype)
        base.config.use_cache = False
        model = get_peft_model(base, config, autocast_adapter_dtype=False).to(dtype)
    return step_of(model.train(), batch_of(size))


def peft_arrow(size: Size, dtype: torch.dtype) -> Step:
    """Eight LoRAs, the best two of each token by prototype; unfrozen by hand so that a step exists."""
    from peft.tuners.lora.config import ArrowConfig

    with tempfile.TemporaryDirectory() as folder:
        paths = _saved_loras(size, dtype, Path(folder))
        model = peft.create_arrow_model(
            base_model=llama(size, dtype), task_specific_adapter_paths=paths, arrow_config=ArrowConfig(top_k=2)
        ).to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and "task_" in name)
    return step_of(model.train(), batch_of(size))


Variants = dict[str, Callable[[Size, torch.dtype], Step]]
FLOOR: Variants = {"frozen base": frozen_base, REFERENCE: peft_lora}
ROUTERS = {
    "by task": ByTask(),
    "top-2 by sequence": TopK(k=2),
    "dense by sequence": Softmax(),
    "dense by token": Softmax(scope="token"),
}


def routings() -> Variants:
    """Return every routing of eight experts, without and with a shared adapter, and peers."""
    found = dict(FLOOR)
    for shared, said in ((False, ""), (True, " + shared")):
        for name, router in ROUTERS.items():
            found[name + said] = partial(mixture, router=router, shared=shared)
    return found | {"peft Poly": peft_poly, "peft X-LoRA": peft_xlora, "peft Arrow top-2": peft_arrow}


def many_experts() -> Variants:
    """Return routings that use few of many experts."""
    found = dict(FLOOR)
    for experts in MANY:
        for name, router in (*list(ROUTERS.items())[:2], ("top-2 by token", TopK(k=2, scope="token"))):
            found[f"{name}, {experts} experts"] = partial(mixture, router=router, experts=experts)
    return found


def families() -> Variants:
    """Return every family that a text model can carry, with its defaults."""
    named = {name: family(**SETTINGS.get(name, {})) for name, family in FAMILIES if name not in WITHOUT}
    return FLOOR | {name: partial(mixture, router=ByTask(), family=family) for name, family in named.items()}


OF = {"routings": routings, "experts": many_experts, "families": families}
SETTINGS: dict[str, dict[str, Any]] = {"bias": {"create": True}}
"""What a family needs beside its defaults on a Llama, which has no biases."""
WITHOUT = {"cross_modal", "soft_slots"}
"""Families that need images, as they cross over to them or read every token of a row."""


def _lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=LEAVES)


def _wake(model: nn.Module) -> None:
    """Leave the start, where zero factors could make products cheap."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)


def _saved_loras(size: Size, dtype: torch.dtype, folder: Path) -> list[str]:
    for index in range(EXPERTS):
        model: PeftModel = get_peft_model(llama(size, dtype), _lora(), autocast_adapter_dtype=False)
        _wake(model)
        model.save_pretrained(str(folder / f"expert{index}"))
    return [str(folder / f"expert{index}") for index in range(EXPERTS)]


def step_ratios(steps: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """Return each variant's median paired ratio to the reference."""
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        seconds = {name: cpu_seconds(step) for name, step in steps.items()}
        if turn >= 2:  # two rounds warm up
            for name, value in seconds.items():
                ratios[name].append(value / seconds[REFERENCE])
    return {name: statistics.median(values) for name, values in ratios.items()}


def cpu_seconds(step: Step) -> float:
    """Return the CPU time of one step."""
    start = time.process_time()
    step()
    return time.process_time() - start


def kept_bytes(step: Step) -> int:
    """Return the bytes of distinct storages that autograd keeps; parameters and views of them are left out."""
    own = {each.untyped_storage().data_ptr() for each in gc.get_objects() if isinstance(each, nn.Parameter)}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(kept.values())


def peak_bytes(step: Step) -> int:
    """Return the highest sum of tensor memory alive at once during a step."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def measure(variants: Variants, size: str, dtype: str, rounds: int) -> dict[str, dict[str, float]]:
    """Measure variants at one size and dtype."""
    steps = {name: make(SIZES[size], getattr(torch, dtype)) for name, make in variants.items()}
    ratios = step_ratios(steps, rounds)
    kept = {name: kept_bytes(step) for name, step in steps.items()}
    peak = {name: peak_bytes(step) for name, step in steps.items()}
    return {
        name: {"step": ratios[name], "kept": kept[name] / kept[REFERENCE], "peak": peak[name] / peak[REFERENCE]}
        for name in steps
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Cost of routing, as ratios to one peft LoRA.")
    parser.add_argument("--of", choices=list(OF), default="routings")
    parser.add_argument("--size", choices=list(SIZES), action="append")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {}
    for size in given.size or list(SIZES):
        for dtype in given.dtype or ["float32", "bfloat16"]:
            found[f"{size} {dtype}"] = measure(OF[given.of](), size, dtype, given.rounds)
            _print(f"{size}, {dtype}: x {REFERENCE}", found[f"{size} {dtype}"])
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


def _print(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    table = Table(title=title)
    for column in ("variant", "step", "kept for backward", "peak memory"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[part]:.2f}" for part in ("step", "kept", "peak")))
    Console(file=sys.stdout).print(table)


if __name__ == "__main__":
    main()
