"""What a step of training holds in memory, found by running one without numbers."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch import Tensor

from moadapt.live_bytes import LiveBytes, bytes_of
from moadapt.mixture import Mixture
from moadapt.skeleton import skeleton


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that one process holds in training.

    Args:
        base: Frozen weights and buffers.
        adapters: Adapters and routers, their buffers among them.
        gradients: Of what is trained.
        optimizer: AdamW's two moments.
        kept: Activations that wait for the backward pass, when it begins.
        temporary: What the fullest moment holds beyond all of these.
        total: At the fullest moment; less than all of these together where gradients come while activations go.
    """

    base: int
    adapters: int
    gradients: int
    optimizer: int
    kept: int
    temporary: int
    total: int

    def as_json(self) -> dict[str, int]:
        """Return all of it as plain values."""
        return asdict(self)


def training_memory(
    build: Callable[[], Mixture], run: Callable[[Mixture], Tensor], accumulates: bool = False
) -> TrainingMemory:
    """Build a mixture without numbers, run a step with it and count; that takes little memory and time.

    Kernels are those of a CPU, whose attention keeps for the backward pass what the fused ones of a GPU keep. Not
    counted are workspaces within kernels, buckets of several processes, and what a device's own context takes.

    Args:
        build: Makes the mixture, in training mode, its base from a config alone.
        run: Calls it on a batch and returns the loss.
        accumulates: Whether gradients of earlier batches are there already.
    """
    with skeleton():
        mixture = build()
        own = [mixture.routers, *(bank for _, bank in mixture.banks())]
        adapters = bytes_of(tensor for part in own for tensor in (*part.parameters(), *part.buffers()))
        trained = bytes_of(parameter for parameter in mixture.parameters() if parameter.requires_grad)
        live = LiveBytes([*mixture.parameters(), *mixture.buffers()])
        weights = live.now
        with live:
            for _ in range(1 + accumulates):
                before = live.now
                loss = run(mixture)
                kept = live.now - before
                loss.backward()  # type: ignore[no-untyped-call]
    moments = 2 * trained
    total = max(live.peak + moments, weights + trained + moments)
    temporary = max(0, total - weights - trained - moments - kept)
    return TrainingMemory(weights - adapters, adapters, trained, moments, kept, temporary, total)
