"""How the digit-scene base is made: patches first, then listings.

For the first steps only the vision tower learns, from what each image patch shows (digit, colour, box) through three
linear heads that are thrown away; then the whole model learns to list scenes in text, the patch loss staying on as a
regulariser. The only pictures are scenes of the training split.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
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
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from moadapt_tasks.digit_scenes.base import PATCH, build_model, build_processor, build_tokenizer
from moadapt_tasks.digit_scenes.listing import list_scene
from moadapt_tasks.digit_scenes.scenes import COLORS, SIZE, Scene, draw_scene
from moadapt_tasks.digit_scenes.vocabulary import WORDS, some_words

_SIDE = SIZE // PATCH
_IGNORED = -100


@dataclass(frozen=True)
class PretrainSettings:
    """The numbers of the recipe."""

    patch_steps: int = 4000
    """Steps on patches only."""
    list_steps: int = 10_000
    """Steps on listings."""
    batch_size: int = 64
    """Scenes a step."""
    scenes: int = 60_000
    """Distinct scenes drawn."""
    learning_rate: float = 1.5e-3
    """Peak of each phase's warm-up and cosine."""
    patch_weight: float = 0.2
    """Weight of the patch loss beside the listing loss."""
    seed: int = 0
    """Seed of weights, scenes and order."""


def patch_targets(scene: Scene) -> NDArray[np.float32]:
    """Say what each patch shows.

    Returns:
        (49, 6): digit (10 where empty), colour index (6 where empty), and the box over the image side, of the object
        that covers most of the patch and at least a quarter of it.
    """
    edges = np.arange(_SIDE) * PATCH
    cover = np.zeros((len(scene.objects), _SIDE, _SIDE))
    for i, thing in enumerate(scene.objects):
        left, top, right, bottom = thing.box
        across = np.minimum(edges + PATCH, right) - np.maximum(edges, left)
        down = np.minimum(edges + PATCH, bottom) - np.maximum(edges, top)
        cover[i] = down.clip(0)[:, None] * across.clip(0)[None, :] / PATCH**2
    rows = [[t.digit, list(COLORS).index(t.color), *(edge / SIZE for edge in t.box)] for t in scene.objects]
    facts = np.array([*rows, [10, len(COLORS), 0, 0, 0, 0]], dtype=np.float32)
    owner = np.where(cover.max(axis=0) >= 0.25, cover.argmax(axis=0), len(scene.objects))
    return facts[owner.ravel()]


class ListingBatches(IterableDataset[dict[str, Tensor]]):
    """Endless batches; batch `i` is a pure function of (seed, i).

    Args:
        scenes: Scenes to list.
        processor: Tokenizer and image processor of the base.
        settings: Batch size and seed.
        start: First batch, so that a resumed run sees what the interrupted one would have seen.
    """

    def __init__(self, scenes: list[Scene], processor: LlavaProcessor, settings: PretrainSettings, start: int) -> None:
        self._settings, self._start, self._scenes = settings, start, scenes
        self._tokenizer: PreTrainedTokenizerFast = processor.tokenizer
        self._image_ids = [processor.image_token_id] * _SIDE**2
        scale = processor.image_processor
        self._mean, self._std = np.float32(scale.image_mean[0]), np.float32(scale.image_std[0])
        self._targets = np.stack([patch_targets(scene) for scene in scenes])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield batches from `start` on."""
        step = self._start
        while True:
            yield self._batch(step)
            step += 1

    def _batch(self, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self._settings.seed, step])
        chosen = rng.integers(len(self._scenes), size=self._settings.batch_size)
        scenes = [self._scenes[i] for i in chosen]
        pixels = np.stack([scene.pixels for scene in scenes]).astype(np.float32) / 255
        batch = self._tokens([list_scene(scene, rng) for scene in scenes])
        batch["pixel_values"] = torch.from_numpy((pixels - self._mean) / self._std).permute(0, 3, 1, 2).contiguous()
        batch["patches"] = torch.from_numpy(self._targets[chosen])
        return batch

    def _tokens(self, texts: list[tuple[str, str]]) -> dict[str, Tensor]:
        prompts = self._tokenizer([prompt + "\n" for prompt, _ in texts]).input_ids
        answers = self._tokenizer([answer + "<eos>" for _, answer in texts]).input_ids
        length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.full((len(texts), len(self._image_ids) + length), self._tokenizer.pad_token_id)
        labels = torch.full_like(ids, _IGNORED)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            tokens = torch.tensor([*self._image_ids, *prompt, *answer])
            ids[row, : len(tokens)] = tokens
            labels[row, len(tokens) - len(answer) : len(tokens)] = tokens[len(tokens) - len(answer) :]
        return {"input_ids": ids, "attention_mask": (ids != self._tokenizer.pad_token_id).long(), "labels": labels}


class ListingModule(lightning.LightningModule):
    """Trains the base on patches, then on listings.

    Args:
        model: The base, trained in place.
        settings: The recipe.
    """

    def __init__(self, model: LlavaForConditionalGeneration, settings: PretrainSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        width = model.get_encoder("image").config.hidden_size
        self.heads = nn.ModuleDict(
            {"digit": nn.Linear(width, 11), "color": nn.Linear(width, len(COLORS) + 1), "box": nn.Linear(width, 4)}
        )

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Return the loss of the phase that this step is in."""
        features: list[Tensor] = []
        targets = batch.pop("patches")
        if self.global_step < self.settings.patch_steps:
            seen = self.model.model.vision_tower(batch["pixel_values"], output_hidden_states=True)
            loss = self._patch_loss(seen.hidden_states[-1][:, 1:], targets)
            self.log("patch_loss", loss, prog_bar=True)
            return loss
        projector = self.model.model.multi_modal_projector
        handle = projector.register_forward_pre_hook(lambda _, args: features.append(args[0]))
        try:
            listing = self._list_loss(batch)
        finally:
            handle.remove()
        patch = self._patch_loss(features[0], targets)
        self.log_dict({"list_loss": listing, "patch_loss": patch}, prog_bar=True)
        return listing + self.settings.patch_weight * patch

    def _list_loss(self, batch: dict[str, Tensor]) -> Tensor:
        answers = batch.pop("labels")[:, 1:]
        hidden = self.model.model(**batch, use_cache=False).last_hidden_state[:, :-1]
        told = answers != _IGNORED
        return functional.cross_entropy(self.model.lm_head(hidden[told]).float(), answers[told])

    def _patch_loss(self, features: Tensor, targets: Tensor) -> Tensor:
        digit, color = targets[..., 0].long(), targets[..., 1].long()
        full = digit != 10
        loss = functional.cross_entropy(self.heads["digit"](features).flatten(0, 1), digit.flatten())
        loss = loss + functional.cross_entropy(self.heads["color"](features).flatten(0, 1), color.flatten())
        apart = (self.heads["box"](features)[full] - targets[..., 2:][full]).abs().mean()
        total: Tensor = loss + 5 * apart
        return total

    def configure_optimizers(self) -> Any:
        """AdamW; each phase has its own warm-up and cosine."""
        decayed = [p for p in self.parameters() if p.ndim > 1]
        plain = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.settings.learning_rate, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        first, second = self.settings.patch_steps, self.settings.list_steps
        done, length = (step, first) if step < first else (step - first, second)
        warm = min(1.0, (done + 1) / min(200, length))
        return warm * (0.02 + 0.98 * 0.5 * (1 + float(np.cos(np.pi * min(1.0, done / length)))))


def pretrain(out: Path, settings: PretrainSettings, work: Path) -> None:
    """Make the base and write it as a transformers folder.

    Args:
        out: Folder for config, weights, tokenizer and processor.
        settings: The recipe.
        work: Folder for checkpoints; a second call there resumes.
    """
    lightning.seed_everything(settings.seed)
    with ProcessPoolExecutor() as pool:
        jobs = [range(start, min(start + 500, settings.scenes)) for start in range(0, settings.scenes, 500)]
        scenes = [scene for drawn in pool.map(_draw_train_scenes, jobs, [settings.seed] * len(jobs)) for scene in drawn]
    processor = build_processor(build_tokenizer(_tokenizer_texts(scenes[:8000], settings.seed)))
    model = build_model(processor.tokenizer)
    model.set_attn_implementation("eager")  # on a CPU, a third of the fused kernel's time at these lengths
    module = ListingModule(model, settings)
    last = work / "last.ckpt"
    start = torch.load(last, weights_only=True, mmap=True)["global_step"] if last.is_file() else 0
    saver = ModelCheckpoint(work, save_last=True, save_top_k=0, every_n_train_steps=250)
    trainer = lightning.Trainer(
        max_steps=settings.patch_steps + settings.list_steps,
        gradient_clip_val=1.0,
        precision="bf16-mixed",
        callbacks=[saver],
        logger=lightning.pytorch.loggers.CSVLogger(work),
        log_every_n_steps=25,
        enable_model_summary=False,
    )
    batches = ListingBatches(scenes, processor, settings, start)
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=last if last.is_file() else None)
    module.model.half().save_pretrained(out)
    processor.save_pretrained(out)


def _draw_train_scenes(indices: range, seed: int) -> list[Scene]:
    return [draw_scene("train", index, seed + 1) for index in indices]


def _tokenizer_texts(scenes: list[Scene], seed: int) -> Iterator[str]:
    rng = np.random.default_rng([seed, 1])
    for scene in scenes:
        yield "\n".join(list_scene(scene, rng))
        yield " ".join(some_words(rng))
        yield "\n".join(WORDS)
