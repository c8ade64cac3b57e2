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


def shared_noise(*key: int) -> torch.Generator:
    """Return a source of random numbers on the CPU that is the same on every process.

    It is none of those that `keyed_noise` makes, to which a key with zeros behind it is the same key.

    Args:
        key: Whole numbers from 0, such as seed and step.
    """
    return torch.Generator().manual_seed(_seed(key, spawn_key=(0,)))


def _seed(key: Sequence[int], spawn_key: Sequence[int] = ()) -> int:
    return int(np.random.SeedSequence(key, spawn_key=spawn_key).generate_state(1, np.uint64)[0])
