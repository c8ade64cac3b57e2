"""Random numbers of a step: a function of (seed, step, process), so that a resumed run needs no stored state."""

from collections.abc import Iterator
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
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
        yield
