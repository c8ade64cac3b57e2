"""Random numbers of a step, from a key of seed, step and process, so that a resumed run needs no stored state."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def keyed_noise(device: torch.device, *key: int) -> Iterator[None]:
    """Draw torch's random numbers from a key within the block; the caller's own go on undisturbed after it.

    Args:
        device: The accelerator in use, or the CPU.
        key: Whole numbers from 0.
    """
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(_seed(key))
        yield


def shared_noise(names: Sequence[str], *key: int) -> dict[str, torch.Generator]:
    """Return for each name a source of random numbers on the CPU that is the same on every process.

    Each has its own, as processes need not come to the same places. They are none of those that `keyed_noise` makes, to
    which a key with zeros behind it is the same key.

    Args:
        names: Such as those of a mixture's places, in the same order on every process.
        key: Whole numbers from 0, such as seed and step.
    """
    seeds = np.random.SeedSequence(key, spawn_key=(0,)).generate_state(max(1, len(names)), np.uint64)
    return {name: torch.Generator().manual_seed(int(seed)) for name, seed in zip(names, seeds, strict=False)}


def _seed(key: Sequence[int]) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
