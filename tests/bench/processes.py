"""What several processes cost: the bytes of a step's messages, and step times on one process and on two.

    python tests/bench/processes.py --rounds 7

Trains the demonstration's mixture through Lightning, by turns on one process, on two with DDP and on two with FSDP2,
always with the same rows a step. Messages are counted where torch sends them, as the size of the tensor that each
process puts in, or for gathered weights of what it gets out; on paper are the trained parameters, and the weights of
the sharded blocks once for the forward and once for the backward pass. A ring of n processes moves 2 (n - 1) / n of a
sum, and (n - 1) / n of what is gathered, through each process. Times are medians over rounds of paired ratios, by the
clock and of the first process's own time on a core: the latter is what is left where the processes have cores of their
own, but for the time that a message travels.
"""

import argparse
import json
import statistics
import time
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from moadapt.demo.settings import MIXTURE, DemoSettings
from moadapt.training import FSDP2Strategy

WARM = 3
"""Steps of a run that are not counted."""
SENDING = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor")
"""What torch sends by; the first thing that each takes is what the others get, or what it gets from them."""
KINDS: dict[str, type[DDPStrategy] | None] = {"one": None, "ddp": DDPStrategy, "fsdp2": FSDP2Strategy}


class Meter(Callback):
    """Times steps, and counts what goes to other processes in them.

    Args:
        file: Where the first process writes what it found.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.ends: list[tuple[float, float]] = []
        self.sent: Counter[str] = Counter()
        self.paper: dict[str, int] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Put counters in the place of what sends."""
        for name in SENDING:
            if hasattr(torch.distributed, name):
                setattr(torch.distributed, name, self._counted(name, getattr(torch.distributed, name)))
        trained = [p for p in module.parameters() if p.requires_grad]
        mixture = module.mixture
        blocks = (mixture.base.get_submodule(path) for path in mixture.anatomy.tower("language").blocks)
        adapters = {parameter for _, parameter in mixture.named_adapter_parameters()}
        weights = {parameter for block in blocks for parameter in block.parameters()} - adapters
        self.paper = {"gradients": _bytes(trained), "blocks": _bytes(weights), "parameters": len(trained)}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        """Count from here where the run is warm."""
        if index == WARM:
            self.sent.clear()

    def on_train_batch_end(self, *args: Any) -> None:
        """Note the time."""
        self.ends.append((time.perf_counter(), time.process_time()))

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        """Write it, on the first process."""
        counted = self.ends[WARM - 1 :]
        steps = len(counted) - 1
        times = [[end[kind] - start[kind] for start, end in pairwise(counted)] for kind in (0, 1)]
        sent = {name: size / steps for name, size in self.sent.items()}
        found = {"clock": statistics.median(times[0]), "core": statistics.median(times[1])}
        if trainer.is_global_zero:
            self.file.write_text(json.dumps({**found, "sent": sent, "paper": self.paper}))

    def _counted(self, name: str, send: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            given = [*args, *kwargs.values()][0]
            self.sent[name] += given.numel() * given.element_size()
            self.sent[f"{name} calls"] += 1
            return send(*args, **kwargs)

        return counting


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def run(folder: Path, kind: str, steps: int) -> dict[str, Any]:
    """Train some steps, and return what the first process found.

    Args:
        folder: Of the data.
        kind: One of `KINDS`.
        steps: How many.
    """
    scenes = {"root": str(folder / "data"), "train": 600, "validation": 10, "test": 10}
    settings, strategy, file = DemoSettings(data_options=scenes), KINDS[kind], folder / f"{kind}.json"
    several = {} if strategy is None else {"strategy": strategy(start_method="fork"), "devices": 2}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[Meter(file)],
        limit_val_batches=0,
        log_every_n_steps=1000,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **several,
    )
    trainer.fit(settings.modules(["vqa", "captioning", "grounding"])[MIXTURE], datamodule=settings.data_module())
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def main() -> None:
    """Print bytes and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/processes"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    rounds = [{kind: run(given.folder, kind, given.steps) for kind in KINDS} for _ in range(given.rounds)]
    paper = rounds[0]["one"]["paper"]
    print(f"on paper: {paper['gradients']:,} bytes in {paper['parameters']} parameters, blocks {paper['blocks']:,}")
    for kind in ("ddp", "fsdp2"):
        print(f"{kind}: {rounds[0][kind]['sent']} in a step")
        for time_of in ("clock", "core"):
            ratios = sorted(each[kind][time_of] / each["one"][time_of] for each in rounds)
            print(f"  {time_of}: {statistics.median(ratios):.2f} of one process ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
