"""How fast a VQA v2 folder trains beside the same batches preloaded, and how soon it starts.

    python tests/bench/loading.py --folder /tmp/vqa_v2 --pictures jpeg
    python tests/bench/loading.py --folder /tmp/vqa_v2 --pictures jpeg --workers 1 --block 20

Writes 20,000 questions about 5,000 digit scenes once, as PNG of 56 x 56 pixels and enlarged to JPEG of 224 x 224, and
trains the demonstration's mixture on them through Lightning: blocks of steps whose batches the loader makes, each
followed by a block on the same batches, kept. A pair's speed is the kept block's time over the other's; printed are the
median over pairs and the middle half. Without workers a block may be one step, which other processes disturb least;
workers make batches ahead, so that blocks must be longer, and their first steps are not counted. The same of the
training process's own time on a core is what remains where nothing else wants the cores, workers aside. The first step
is timed from the end of the imports.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch import Callback
from PIL import Image

from moadapt.demo.settings import MIXTURE, DemoSettings
from moadapt.training import MixedTasks
from moadapt.training.batch import Batch
from moadapt_tasks.digit_scenes.files import SplitSettings, write_split
from moadapt_tasks.vqa import VQA

AHEAD = 4
"""Steps of a block that are not counted where workers make batches ahead."""
PATTERNS = {"png": "images/{image_id:06d}.png", "jpeg": "large/{image_id:06d}.jpg"}


def write(folder: Path, split: str, scenes: int) -> None:
    """Write a split's questions and scenes, and the scenes enlarged."""
    if not write_split(folder / split, SplitSettings(split, scenes, 4, 1, 0)):
        return
    (folder / split / "large").mkdir()
    for file in (folder / split / "images").iterdir():
        with Image.open(file) as scene:
            scene.resize((224, 224)).save(folder / split / "large" / f"{file.stem}.jpg", quality=90)


class Paired:
    """A loader whose batches come in blocks, each block a second time as it was kept."""

    def __init__(self, batches: Any, block: int, pairs: int) -> None:
        self.batches, self.block, self.pairs = batches, block, pairs

    def __len__(self) -> int:
        return 2 * self.block * self.pairs

    def __iter__(self) -> Iterator[Batch]:
        made = iter(self.batches)
        for _ in range(self.pairs):
            kept = []
            for _ in range(self.block):
                kept.append(next(made))
                yield kept[-1]
            yield from kept


class PairedTasks(MixedTasks):
    """Gives every block of training batches twice."""

    block, pairs = 1, 1

    def train_dataloader(self) -> Any:
        return Paired(super().train_dataloader(), self.block, self.pairs)


class Clock(Callback):
    """Notes when steps end, and how long this process had a core by then."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    def blocks(self, kind: int, block: int, ahead: int) -> list[float]:
        """Return the mean step of each block, in seconds, but of the first pair, which warms up.

        Args:
            kind: 0 for the clock's time, 1 for that on a core.
            block: Steps of a block.
            ahead: How many of its first steps are not counted.
        """
        ends = [end[kind] for end in self.ends[2 * block - 1 :]]
        return [(ends[i + block] - ends[i + ahead]) / (block - ahead) for i in range(0, len(ends) - 1, block)]


def told(blocks: list[float]) -> str:
    """Compare blocks that the loader made with the same, kept."""
    made, kept = blocks[::2], blocks[1::2]
    low, middle, high = statistics.quantiles([k / m for m, k in zip(made, kept, strict=True)], n=4)
    steps = f"{1e3 * statistics.median(made):.0f} ms a step, preloaded {1e3 * statistics.median(kept):.0f} ms"
    return f"{steps}, speed {middle:.3f} of preloaded ({low:.3f} to {high:.3f})"


def fit(folder: Path, pictures: str, workers: int, block: int, pairs: int) -> Clock:
    """Train, and return when the steps ended."""
    settings, clock = DemoSettings(), Clock()
    files = {name: f"{folder}/{{split}}/{name}.json" for name in ("questions", "annotations")}
    task = VQA(**files, images=f"{folder}/{{split}}/{PATTERNS[pictures]}")
    data = PairedTasks(settings.base, tasks={"vqa": task}, batch_size=settings.batch_size, num_workers=workers)
    data.block, data.pairs = block, pairs + 1
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[clock],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(settings.modules(["vqa"])[MIXTURE], datamodule=data)
    return clock


def main() -> None:
    """Print start and speed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/vqa_v2"))
    parser.add_argument("--pictures", choices=PATTERNS, default="png")
    parser.add_argument("--scenes", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--block", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=60)
    given = parser.parse_args()
    write(given.folder, "train", given.scenes)
    write(given.folder, "validation", 50)
    start = time.perf_counter()
    clock = fit(given.folder, given.pictures, given.workers, given.block, given.pairs)
    print(f"{4 * given.scenes} rows, {given.pictures}, {given.workers} workers")
    print(f"first step ends after {clock.ends[0][0] - start:.2f} s")
    for kind, name in enumerate(("by the clock", "on a core")):
        print(f"{name}: {told(clock.blocks(kind, given.block, AHEAD if given.workers else 0))}")


if __name__ == "__main__":
    main()
