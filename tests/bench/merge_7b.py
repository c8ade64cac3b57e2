"""A merge of eight adapters into a base of the shape of Llama-2-7B, from files to files: time, and memory at its peak.

    python tests/bench/merge_7b.py make --work /tmp/seven    # 13.5 GB of random weights in bfloat16, eight random LoRAs
    python tests/bench/merge_7b.py merge --work /tmp/seven --method task_arithmetic    # an interrupted one goes on

Memory is the largest resident set of the process, as the kernel counts it. The folder may be deleted afterwards.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from moadapt.adapters import LoRA
from moadapt.bases import outline
from moadapt.fingerprint import of_samples, sampled
from moadapt.merging.streaming import merge_stored
from moadapt.mixture import Mixture
from moadapt.mixture_spec import MixtureSpec
from moadapt.placement import Placement
from moadapt.registry import FAMILIES, ROUTERS
from moadapt.specs import fields_of, to_json
from moadapt.storage import SCHEMA
from moadapt_routers import ByTask

EXPERTS, RANK, SHARD = 8, 16, 2 * 10**9
SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


def make(work: Path, layers: int) -> None:
    """Write a base and a mixture of it, tensor by tensor, as `save_pretrained` and `Mixture.save` would."""
    config = LlamaConfig(vocab_size=32000, architectures=["LlamaForCausalLM"], dtype="bfloat16", **SHAPE)
    config.num_hidden_layers = layers
    config.save_pretrained(work / "base")
    base = outline(str(work / "base"))
    block = (0.02 * torch.randn(1 << 24)).to(torch.bfloat16)

    def drawn(shape: tuple[int, ...]) -> torch.Tensor:
        """Random numbers, a block of them over and over, begun at a random place."""
        count = torch.Size(shape).numel()
        start = int(torch.randint(len(block) // 2, ()))
        part = block[start : start + count]
        return part.repeat(-(-count // len(part)))[:count].view(shape).clone()

    samples, shard, size, placed = {}, {}, 0, {}
    named = [(name, tuple(parameter.shape)) for name, parameter in base.named_parameters()]
    files = 0
    for name, shape in named:
        shard[name] = drawn(shape)
        samples[name] = sampled(shard[name])
        size += shard[name].nbytes
        if size > SHARD or name == named[-1][0]:
            files += 1
            file = f"model-{files:05d}.safetensors"
            save_file(shard, work / "base" / file, metadata={"format": "pt"})
            placed |= dict.fromkeys(shard, file)
            shard, size = {}, 0
    index = {"metadata": {}, "weight_map": placed}
    (work / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    spec = MixtureSpec({f"task{i}": LoRA(rank=RANK) for i in range(EXPERTS)}, None, ByTask(), Placement())
    stored = {
        "schema": SCHEMA,
        "base": {"name": str(work / "base"), **of_samples(base, samples)},
        "shared": None,
        "experts": [{"adapter": name, **to_json(family, FAMILIES)} for name, family in spec.experts.items()],
        "router": to_json(ByTask(), ROUTERS),
        "placement": fields_of(spec.placement),
        "frozen": [],
    }
    tensors = {}
    for site in Mixture(base, spec).sites:
        for name in spec.experts:
            for part, width in (("down", site.in_features), ("up", site.out_features)):
                tensors[f"adapters/{name}/{site.path}/{part}"] = drawn((RANK, width))
    (work / "mixture").mkdir(exist_ok=True)
    save_file(tensors, work / "mixture" / "adapters.safetensors", metadata={"format": "pt"})
    (work / "mixture" / "mixture.json").write_text(json.dumps(stored))
    count = sum(torch.Size(shape).numel() for _, shape in named)
    print(f"{count:,} parameters in {files} files; {sum(t.numel() for t in tensors.values()):,} of adapters")


def merge(work: Path, method: str, shard_size: str, options: dict[str, float]) -> None:
    """Merge, and tell time and memory."""
    start = time.monotonic()

    def told(done: int, whole: int) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{done / whole:6.1%}  {time.monotonic() - start:6.0f} s  peak {peak:.2f} GiB", flush=True)

    out = work / f"merged-{method}"
    report = merge_stored(work / "mixture", work / "base", out, method, shard_size=shard_size, progress=told, **options)
    print(f"{method}: exact {report.exact}; {len(list(out.glob('*.safetensors')))} files")


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "merge"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--method", default="task_arithmetic")
    parser.add_argument("--shard-size", default="1GB")
    parser.add_argument("--layers", type=int, default=32, help="fewer make a smaller base")
    parser.add_argument("--options", type=json.loads, default={}, help="of the method, as JSON")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.command == "make":
        make(given.work, given.layers)
    else:
        merge(given.work, given.method, given.shard_size, given.options)


if __name__ == "__main__":
    main()
