"""What the initial states of LoRA cost beside the peft library's own, on a scratch layer of it.

    python tests/bench/initial_states.py

Five adapters of rank 8 start at one layer: here, where what is found in a weight is kept for all of them; by a layer
of peft for each; and by one layer of peft at full rank, of which every adapter takes a part. One thread, the least of
three.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import collect_eigens_for_layer
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from moadapt.adapters.initial import Layer
from moadapt.registry import INITIALS

ADAPTERS, RANK, SCALE = 5, 8, 1.5
Pair = tuple[Tensor, Tensor]


def own(init: str, weight: Tensor, inputs: Tensor) -> list[Pair]:
    """Return the factors of all adapters, by moadapt."""
    wide, narrow, initial = weight.shape[1], weight.shape[0], INITIALS.get(init)()
    layer = Layer(wide, narrow, RANK, SCALE, weight.device, lambda: weight, inputs)
    return [initial.factors(layer) for _ in range(ADAPTERS)]


def by_peft(init: str, weight: Tensor, inputs: Tensor, rank: int = RANK) -> Pair:
    """Return the factors of one adapter, by a layer of peft on a copy of the weight, which peft changes."""
    linear: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    name = "corda" if init.startswith("corda") else init
    corda = CordaConfig(corda_method="ipm") if name == "corda" else None
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, init_lora_weights=name, corda_config=corda)  # type: ignore[arg-type]
    if name == "corda":
        linear.covariance_matrix = inputs
        eigens = collect_eigens_for_layer(linear, config)
        eigens.S_WC, eigens.U_WC, eigens.V_WC = eigens.S_WC[:rank], eigens.U_WC[:, :rank], eigens.V_WC[:, :rank]
        linear.eigens = eigens
    layer: Any = Linear(linear, "default", config=config, r=rank, lora_alpha=SCALE * rank)  # type: ignore[arg-type]
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach().T


def seconds(act: Callable[[], object]) -> float:
    """Return the least time of three."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        act()
        found.append(time.perf_counter() - start)
    return min(found)


def main() -> None:
    """Print milliseconds by initial state and shape of the layer."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for narrow, wide in ((1024, 1024), (4096, 1024)):
        weight, x = torch.randn(narrow, wide), torch.randn(4000, wide)
        inputs = x.T @ x / len(x)
        for init in ("pissa", "olora", "orthogonal", "corda_preview"):
            forms: dict[str, Callable[[], object]] = {
                "here": lambda: own(init, weight, inputs),  # noqa: B023
                "peft each": lambda: [by_peft(init, weight, inputs) for _ in range(ADAPTERS)],  # noqa: B023
            }
            if init != "orthogonal":
                forms["peft once"] = lambda: by_peft(init, weight, inputs, min(weight.shape))  # noqa: B023
            times = ", ".join(f"{form} {1e3 * seconds(act):.0f}" for form, act in forms.items())
            print(f"{narrow} x {wide} {init}: {times} ms", flush=True)


if __name__ == "__main__":
    main()
