"""The base of the easy-VQA measurement: a small LLaVA that names colour, shape and place of what an image shows.

It meets no question, no caption and no text of a box. Prompts ask for some of three things, `list color place`, and the
place is the upper left corner and the size of the shape, in thousandths; of another colour or shape than the prompt may
name there is `nothing` to list. One row in six repeats bare words, so that no embedding stays untrained. Beside the
texts, heads that are thrown away learn colour, shape and edges from each patch of the shape. Pictures are those of the
training split, mirrored and moved to anywhere that holds their shape.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from moadapt.training.kept import read_checkpoint
from moadapt_tasks.digit_scenes.base import PATCH, build_config, build_processor, build_tokenizer
from moadapt_tasks.digit_scenes.listing_batches import IGNORED, packed, scaled
from moadapt_tasks.digit_scenes.pretrain import optimizers_of
from moadapt_tasks.digit_scenes.vocabulary import some_words
from tests.bench.easy_vqa.files import COLORS, SHAPES, SIDE, Facts, picture_of, read_facts

WORDS = (*COLORS, *SHAPES, "contain", "present", "shape", "image", "color", "describe", "picture", "is", "no", "yes")
STEPS, BATCH, RATE, WIDTH = 2000, 32, 2e-3, 96
_ACROSS = SIDE // PATCH
_CHOICES = {"color": COLORS, "shape": SHAPES}
_FILLERS = ("image", "picture", "shape", "present", "in the image", "a", "the")


def listing(facts: Facts, rng: np.random.Generator) -> tuple[str, str]:
    """Draw a prompt about an image, or about bare words, and its answer."""
    if rng.random() < 1 / 6:
        words = " ".join(str(word) for word in rng.permutation([*some_words(rng), *rng.choice(WORDS, size=4)]))
        return f"repeat {words}", words
    left, top, right, bottom = (round(999 * edge / SIDE) for edge in facts["box"])
    told = {
        "color": facts["color"],
        "shape": facts["shape"],
        "place": f"[{left}, {top}] [{right - left}, {bottom - top}]",
    }
    known = [name for name, value in told.items() if value]
    asked = rng.permutation(known)[: rng.integers(1, len(known) + 1)]
    answer = " ".join(told[str(name)] for name in asked)
    named = [name for name in ("color", "shape") if facts[name]]
    if not named or rng.random() < 0.3:
        return f"list {' '.join(asked)}", answer
    of = rng.permutation(named)[: rng.integers(1, len(named) + 1)]
    words = [facts[name] if rng.random() < 0.6 else str(rng.choice(_CHOICES[name])) for name in of]
    there = all(word == facts[name] for name, word in zip(of, words, strict=True))
    return _said(f"of {' '.join(words)}", f"list {' '.join(asked)}", rng), answer if there else "nothing"


def _said(of: str, what: str, rng: np.random.Generator) -> str:
    """Put what to list before or behind of what, with bare words about them, so that no place in the prompt counts."""
    parts = [of, what] if rng.random() < 0.5 else [what, of]
    for place in (2, 1, 0):
        if rng.random() < 0.3:
            parts.insert(place, str(rng.choice(_FILLERS)))
    return " ".join(parts)


def moved(pixels: NDArray[np.uint8], facts: Facts, rng: np.random.Generator) -> tuple[NDArray[np.uint8], Facts]:
    """Mirror a picture half of the time, and move its shape to anywhere; backgrounds are of one colour."""
    left, top, right, bottom = facts["box"]
    if rng.random() < 0.5:
        pixels, (left, right) = pixels[:, ::-1], (SIDE - right, SIDE - left)
    across, down = int(rng.integers(-left, SIDE - right + 1)), int(rng.integers(-top, SIDE - bottom + 1))
    box = [left + across, top + down, right + across, bottom + down]
    return np.roll(pixels, (down, across), axis=(0, 1)), {**facts, "box": box}


class Listings(IterableDataset[dict[str, Tensor]]):
    """Endless batches; batch `i` is a pure function of (seed, i).

    Args:
        source: The authors' folder.
        folder: The prepared files.
        processor: Of the base.
        seed: Of what is drawn.
        start: First batch.
    """

    def __init__(self, source: Path, folder: Path, processor: LlavaProcessor, seed: int, start: int) -> None:
        found = read_facts(folder, "train")
        self._facts = list(found.values())
        self._pixels = [picture_of(source, key) for key in found]
        self._processor, self._seed, self._start = processor, seed, start

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield batches from `start` on."""
        step = self._start
        while True:
            yield self._batch(np.random.default_rng([self._seed, step]))
            step += 1

    def _batch(self, rng: np.random.Generator) -> dict[str, Tensor]:
        chosen = rng.integers(len(self._facts), size=BATCH)
        shown = [moved(self._pixels[i], self._facts[i], rng) for i in chosen]
        batch = packed([listing(facts, rng) for _, facts in shown], self._processor, _ACROSS**2)
        batch["pixel_values"] = scaled(np.stack([pixels for pixels, _ in shown]), self._processor)
        batch["patches"] = torch.from_numpy(np.stack([patch_targets(facts) for _, facts in shown]))
        return batch


def patch_targets(facts: Facts) -> NDArray[np.float32]:
    """Say what each patch shows.

    Returns:
        (64, 6): colour and shape index (-100 where unknown, the number of them outside the box), box over the side.
    """
    left, top, right, bottom = facts["box"]
    edges = np.arange(_ACROSS) * PATCH
    across, down = (edges < right) & (edges + PATCH > left), (edges < bottom) & (edges + PATCH > top)
    color = COLORS.index(facts["color"]) if facts["color"] else IGNORED
    shape = SHAPES.index(facts["shape"]) if facts["shape"] else IGNORED
    inside = [color, shape, *(edge / SIDE for edge in facts["box"])]
    rows = np.array([inside, [len(COLORS), len(SHAPES), 0, 0, 0, 0]], dtype=np.float32)
    return rows[np.where((down[:, None] & across[None]).ravel(), 0, 1)]


class ListingModule(lightning.LightningModule):
    """Trains the base.

    Args:
        model: The base, trained in place.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        sizes = {"color": len(COLORS) + 1, "shape": len(SHAPES) + 1, "box": 4}
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in sizes.items()})

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Make one step."""
        targets, features = batch.pop("patches"), []
        projector = self.model.model.multi_modal_projector
        handle = projector.register_forward_pre_hook(lambda _, args: features.append(args[0]))
        try:
            text = self.model(**batch, use_cache=False).loss
        finally:
            handle.remove()
        patch = self._patch_loss(features[0], targets)
        self.log_dict({"text_loss": text, "patch_loss": patch}, prog_bar=True)
        matrices, others = self.optimizers()
        matrices.zero_grad()
        others.zero_grad()
        self.manual_backward(text + 0.5 * patch)
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        matrices.step()
        others.optimizer.step()  # the bare optimiser's: Lightning counts the steps of the first alone
        for schedule in self.lr_schedulers():
            schedule.step()

    def _patch_loss(self, features: Tensor, targets: Tensor) -> Tensor:
        color, shape = targets[..., 0].long(), targets[..., 1].long()
        inside = color != len(COLORS)
        loss = functional.cross_entropy(self.heads["color"](features).flatten(0, 1).float(), color.flatten())
        loss = loss + functional.cross_entropy(self.heads["shape"](features).flatten(0, 1).float(), shape.flatten())
        return loss + 5 * (self.heads["box"](features)[inside].float() - targets[..., 2:][inside]).abs().mean()

    def configure_optimizers(self) -> Any:
        """Muon for the matrices of blocks and projector, AdamW for the rest."""
        optimizers = optimizers_of(self, self.model, RATE)
        return optimizers, [torch.optim.lr_scheduler.LambdaLR(each, self._rate) for each in optimizers]

    def _rate(self, step: int) -> float:
        steps = self.trainer.max_steps
        warm = min(1.0, (step + 1) / 100)
        return warm * (0.02 + 0.98 * 0.5 * (1 + float(np.cos(np.pi * min(step, steps) / steps))))


def pretrain(source: Path, folder: Path, out: Path, work: Path, seed: int, steps: int = STEPS) -> None:
    """Make the base and write it as a transformers folder; a second call resumes, or does nothing.

    Args:
        source: The authors' folder.
        folder: The prepared files.
        out: Folder of the base.
        work: Folder for checkpoints.
        seed: Of weights and of what is drawn.
        steps: How many.
    """
    if (out / "config.json").is_file():
        return
    lightning.seed_everything(seed, verbose=False)
    processor = build_processor(build_tokenizer(_tokenizer_texts(folder, seed)), SIDE)
    scale = processor.image_processor
    scale.image_mean = scale.image_std = [0.5] * 3
    model = LlavaForConditionalGeneration(build_config(processor.tokenizer, SIDE, WIDTH))
    model.set_attn_implementation("eager")
    last = work / "last.ckpt"
    start = read_checkpoint(last, mmap=True)["global_step"] if last.is_file() else 0
    trainer = lightning.Trainer(
        max_steps=steps,
        precision="bf16-mixed",
        callbacks=[ModelCheckpoint(work, save_last=True, save_top_k=0, every_n_train_steps=250)],
        logger=lightning.pytorch.loggers.CSVLogger(work),
        log_every_n_steps=25,
        enable_model_summary=False,
    )
    batches = DataLoader(Listings(source, folder, processor, seed, start), batch_size=None)
    trainer.fit(ListingModule(model), batches, ckpt_path=last if last.is_file() else None)
    processor.save_pretrained(out)
    model.save_pretrained(out)


def _tokenizer_texts(folder: Path, seed: int) -> Iterator[str]:
    rng = np.random.default_rng([seed, 1])
    facts = list(read_facts(folder, "train").values())
    for _ in range(8000):
        yield "\n".join(listing(facts[rng.integers(len(facts))], rng))
