"""What a run came to, to be compared with another."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "MixedTasks", "global_step", "epoch")


def leaves(value: Any, place: str = "") -> dict[str, Any]:
    """Return every tensor and number of nested containers by its place."""
    if isinstance(value, dict):
        return {k: leaf for key, v in value.items() for k, leaf in leaves(v, f"{place}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: leaf for i, v in enumerate(value) for k, leaf in leaves(v, f"{place}/{i}").items()}
    return {place: value}


def outcome(run: Path) -> dict[str, Any]:
    """Return the leaves of checkpoint and saved mixture."""
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    mixture = load_file(run / "mixture" / "adapters.safetensors")
    return leaves({**{name: checkpoint[name] for name in COMPARED}, "mixture": mixture})


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Require that two outcomes are equal, bit for bit."""
    assert found.keys() == expected.keys()
    tensors = {place for place, leaf in expected.items() if isinstance(leaf, torch.Tensor)}
    assert len(tensors) > 100
    assert [place for place in tensors if not torch.equal(found[place], expected[place])] == []
    assert {p: leaf for p, leaf in found.items() if p not in tensors} == {
        p: leaf for p, leaf in expected.items() if p not in tensors
    }
