"""How the digit-scene base is made: patches first, then listings, then listings that look things up.

For the first steps only the vision tower learns, from what each image patch shows (digit, colour, box) through three
linear heads that are thrown away; then the whole model learns to list scenes in text, the patch loss staying on as a
regulariser. Prompts that name objects come last: a model that cannot list yet learns nothing from them. The only
pictures are scenes of the training split. Matrices are trained by Muon, the rest by AdamW.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import LlavaForConditionalGeneration

from moadapt.training.kept import read_checkpoint
from moadapt_tasks.digit_scenes.base import build_model, build_processor, build_tokenizer
from moadapt_tasks.digit_scenes.listing import list_scene
from moadapt_tasks.digit_scenes.listing_batches import IGNORED, ListingBatches
from moadapt_tasks.digit_scenes.recipe import PretrainSettings
from moadapt_tasks.digit_scenes.scenes import COLORS, Scene, draw_scene
from moadapt_tasks.digit_scenes.vocabulary import WORDS, some_words


class ListingModule(lightning.LightningModule):
    """Trains the base on patches, then on listings.

    Args:
        model: The base, trained in place.
        settings: The recipe.
    """

    def __init__(self, model: LlavaForConditionalGeneration, settings: PretrainSettings) -> None:
        super().__init__()
        self.automatic_optimization = False  # there are two optimisers, and one step of both
        self.model, self.settings = model, settings
        width = model.get_encoder("image").config.hidden_size
        self.heads = nn.ModuleDict(
            {
                "digit": nn.Linear(width, 11),
                "color": nn.Linear(width, len(COLORS) + 1),
                "box": nn.Linear(width, 4),
                "begun": nn.Linear(model.get_decoder().config.hidden_size, 4),
            }
        )

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Make one step of the phase that it is in."""
        loss = self._patches(batch) if self.global_step < self.settings.patch_steps else self._listings(batch)
        matrices, others = self._optimizers()
        matrices.zero_grad()
        others.zero_grad()
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        matrices.step()
        others.optimizer.step()  # the bare optimiser's: Lightning counts the steps of the first alone
        for schedule in self._schedules():
            schedule.step()

    def _patches(self, batch: dict[str, Tensor]) -> Tensor:
        seen = self.model.model.vision_tower(batch["pixel_values"], output_hidden_states=True)
        loss = self._patch_loss(seen.hidden_states[-1][:, 1:], batch["patches"])
        self.log("patch_loss", loss, prog_bar=True)
        return loss

    def _listings(self, batch: dict[str, Tensor]) -> Tensor:
        features: list[Tensor] = []
        targets, boxes = batch.pop("patches"), batch.pop("boxes")
        projector = self.model.model.multi_modal_projector
        handle = projector.register_forward_pre_hook(lambda _, args: features.append(args[0]))
        try:
            listing, begun = self._list_losses(batch, boxes)
        finally:
            handle.remove()
        patch = self._patch_loss(features[0], targets)
        self.log_dict({"list_loss": listing, "begun_loss": begun, "patch_loss": patch}, prog_bar=True)
        return listing + self.settings.begun_weight * begun + self.settings.patch_weight * patch

    def _list_losses(self, batch: dict[str, Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of the listings' tokens, and how far off the boxes are when their brackets open.

        A box's first number alone says which object is meant, and the others follow from it; asking for the whole box
        at its bracket makes finding an object by its name worth four numbers instead of one.
        """
        answers = batch.pop("labels")[:, 1:]
        hidden = self.model.model(**batch, use_cache=False).last_hidden_state
        told, begun = answers != IGNORED, ~boxes[..., 0].isnan()
        listing = functional.cross_entropy(self.model.lm_head(hidden[:, :-1][told]).float(), answers[told])
        return listing, (self.heads["begun"](hidden[begun]).float() - boxes[begun]).abs().mean()

    def _patch_loss(self, features: Tensor, targets: Tensor) -> Tensor:
        digit, color = targets[..., 0].long(), targets[..., 1].long()
        full = digit != 10
        loss = functional.cross_entropy(self.heads["digit"](features).flatten(0, 1), digit.flatten())
        loss = loss + functional.cross_entropy(self.heads["color"](features).flatten(0, 1), color.flatten())
        apart = (self.heads["box"](features)[full] - targets[..., 2:][full]).abs().mean()
        total: Tensor = loss + 5 * apart
        return total

    def configure_optimizers(self) -> Any:
        """Muon for the matrices of blocks and projector, AdamW for the rest; each phase has its warm-up and cosine."""
        optimizers = optimizers_of(self, self.model, self.settings.learning_rate)
        return optimizers, [torch.optim.lr_scheduler.LambdaLR(each, self._rate) for each in optimizers]

    def _optimizers(self) -> tuple[Any, Any]:
        found: Any = self.optimizers()
        return found[0], found[1]

    def _schedules(self) -> list[Any]:
        found: Any = self.lr_schedulers()
        return list(found)

    def _rate(self, step: int) -> float:
        done, length = step, self.settings.patch_steps
        for later in (self.settings.list_steps, self.settings.lookup_steps):
            if done >= length:
                done, length = done - length, later
        done = min(done, length)
        warm = min(1.0, (done + 1) / min(200, max(1, length)))
        return warm * (0.02 + 0.98 * 0.5 * (1 + float(np.cos(np.pi * done / max(1, length)))))


def optimizers_of(module: nn.Module, model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of a base's blocks and projector, and AdamW for the rest.

    Args:
        module: What is trained: the base, and heads that are thrown away.
        model: The base.
        rate: Peak rate of matrices; everything else gets half of it.
    """
    inner = {
        parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
    }
    matrices = [p for p in module.parameters() if p in inner]
    others = [p for p in module.parameters() if p not in inner]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate / 2, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def pretrain(out: Path, settings: PretrainSettings, work: Path) -> None:
    """Make the base and write it as a transformers folder.

    Args:
        out: Folder for config, weights, tokenizer and processor.
        settings: The recipe.
        work: Folder for checkpoints; a second call there resumes.

    Raises:
        ValueError: The checkpoints there belong to another recipe.
    """
    _refuse_other_settings(work / "recipe.json", settings)
    lightning.seed_everything(settings.seed)
    with ProcessPoolExecutor() as pool:
        jobs = [range(start, min(start + 500, settings.scenes)) for start in range(0, settings.scenes, 500)]
        scenes = [scene for drawn in pool.map(_draw_train_scenes, jobs, [settings.seed] * len(jobs)) for scene in drawn]
    processor = build_processor(build_tokenizer(_tokenizer_texts(scenes[:8000], settings.seed)))
    model = build_model(processor.tokenizer)
    model.set_attn_implementation("eager")  # on a CPU, a third of the fused kernel's time at these lengths
    module = ListingModule(model, settings)
    last = work / "last.ckpt"
    start = read_checkpoint(last, mmap=True)["global_step"] if last.is_file() else 0
    saver = ModelCheckpoint(work, save_last=True, save_top_k=0, every_n_train_steps=250)
    trainer = lightning.Trainer(
        max_steps=settings.steps,
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


def _refuse_other_settings(file: Path, settings: PretrainSettings) -> None:
    """Write down which recipe a folder of checkpoints belongs to, or require that it is this one."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(settings), indent=1) + "\n")
    elif (stored := json.loads(file.read_text())) != asdict(settings):
        raise ValueError(f"{file.parent} holds checkpoints of {stored}, not of {settings}; give another folder")


def _draw_train_scenes(indices: range, seed: int) -> list[Scene]:
    return [draw_scene("train", index, seed + 1) for index in indices]


def _tokenizer_texts(scenes: list[Scene], seed: int) -> Iterator[str]:
    rng = np.random.default_rng([seed, 1])
    for scene in scenes:
        yield "\n".join(list_scene(scene, rng))
        yield " ".join(some_words(rng))
        yield "\n".join(WORDS)
