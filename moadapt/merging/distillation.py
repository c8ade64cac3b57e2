"""Distillation: a closed-form merge, trained until it predicts what the routed mixture predicts.

Hinton et al., "Distilling the Knowledge in a Neural Network", at temperature 1: the student is one LoRA without a
router, that of another merge to begin with, and minimises `KL(routed || merged)` of the predictions on calibration
rows. Axes: N positions that predict, V classes or tokens.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import lightning
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from moadapt.adapters.delta import Delta
from moadapt.adapters.lora import LoRA
from moadapt.composing import build_filled
from moadapt.merging.calibration import Batch
from moadapt.merging.deltas import compact, total, truncated
from moadapt.merging.method import Blend, MergeMethod, Merging, SiteMerge
from moadapt.merging.outputs import predicting
from moadapt.merging.statistics import adapters_of
from moadapt.mixture import Mixture
from moadapt.mixture_spec import MixtureSpec
from moadapt.names import SHARED
from moadapt.placement import Placement
from moadapt.registry import MERGES
from moadapt.specs import bind

_TO_BASE_UNKNOWN = ("task", "prompt_mask", "labels")


@MERGES.register("distillation")
@dataclass(frozen=True, kw_only=True)
class Distillation(MergeMethod):
    """Trains another merge, as one LoRA without a router, to predict what the routed mixture predicts.

    Args:
        start: Short name of the merge to begin with.
        steps: How many training steps, one batch each, at least 1.
        learning_rate: At the first step, above 0; it falls to 0 by the last.
        max_rank: Of the LoRA at a site at most; None keeps those of the merge.
        seed: Of the order of batches.

    Raises:
        ValueError: A number is out of range.
    """

    start: str = "least_squares"
    steps: int = 100
    learning_rate: float = 1e-3
    max_rank: int | None = None
    seed: int = 0

    always_reads_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.steps < 1 or not self.learning_rate > 0 or (self.max_rank or 1) < 1:
            raise ValueError(
                f"merge 'distillation' got steps={self.steps}, learning_rate={self.learning_rate}, "
                f"max_rank={self.max_rank}; steps and ranks are at least 1, the rate is above 0"
            )

    def prepare(self, merging: Merging) -> SiteMerge:
        """Train, unless the routing is fixed and so the merge exact.

        Raises:
            ValueError: The base gives no logits, or the merge to begin with is no LoRA.
        """
        if merging.fixed is not None:
            return Blend(merging.by_site(merging.weights()))
        mixture = merging.mixture
        merge = bind(MERGES.get(self.start), {}).prepare(merging)
        begun = {at.site.path: self._cut(at.site.path, total(merge(at))) for at in adapters_of(mixture)}
        rows = [_row(mixture, batch) for batch in merging.rows]
        with mixture.bare_base() as base:
            student = _student(base, {path: change for path, change in begun.items() if len(change.down)})
            _fit(student, rows, self)
            found = {s.path: bank.delta(torch.zeros(0)) for s, bank in student.banks()}
            student.detach()
        return lambda at: [found.get(at.site.path, begun[at.site.path])]

    def _cut(self, path: str, change: Delta) -> Delta:
        if change.dense is not None or change.bias is not None or change.parameters or change.down.ndim > 2:
            raise ValueError(
                f"merge 'distillation' trains a LoRA, and merge {self.start!r} makes another change at {path}; begin "
                "with one that keeps low rank, such as least_squares, and with experts that are LoRAs of linear layers"
            )
        change = compact(change)
        return change if self.max_rank is None or not len(change.down) else truncated(change, self.max_rank)[0]


@dataclass(frozen=True)
class _Row:
    """A batch, and what the mixture predicts on it: log-probabilities (N, V) at the positions that count."""

    inputs: Mapping[str, Any]
    told: Tensor
    routed: Tensor


def _row(mixture: Mixture, batch: Batch) -> _Row:
    with torch.no_grad():
        logits = getattr(mixture(**batch), "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError("merge 'distillation' compares predictions, and this base gives no logits")
    told = predicting(batch, logits, mixture.base)
    inputs = {name: value for name, value in batch.items() if name not in _TO_BASE_UNKNOWN}
    return _Row(inputs, told, logits[told].float().log_softmax(-1))


def _student(base: PreTrainedModel, changes: Mapping[str, Delta]) -> Mixture:
    """Return a mixture of one shared LoRA that makes these changes."""
    ranks = {path: len(change.down) for path, change in changes.items()}
    lora = LoRA(rank=max(ranks.values()), ranks=ranks)
    spec = MixtureSpec({}, lora, None, Placement(modules=tuple(ranks), unread=True))
    sides: dict[str, Tensor] = {}
    for path, change in changes.items():
        sides |= {f"adapters/{SHARED}/{path}/down": change.down, f"adapters/{SHARED}/{path}/up": change.up}
    return build_filled(base, spec, sides, ())


def _fit(student: Mixture, rows: Sequence[_Row], settings: Distillation) -> None:
    generator = torch.Generator().manual_seed(settings.seed)
    loader: DataLoader[_Row] = DataLoader(rows, batch_size=None, shuffle=True, generator=generator)  # type: ignore[arg-type]
    trainer = lightning.Trainer(
        accelerator=student.base.device.type if student.base.device.type != "cuda" else "gpu",
        devices=1,
        max_steps=settings.steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")  # the frozen base, on purpose
        trainer.fit(_Student(student, settings), loader)


class _Student(lightning.LightningModule):
    """Learns the predictions of the routed mixture.

    Args:
        mixture: Of one LoRA.
        settings: How to train.
    """

    def __init__(self, mixture: Mixture, settings: Distillation) -> None:
        super().__init__()
        self.mixture, self._settings = mixture, settings

    def transfer_batch_to_device(self, batch: _Row, device: torch.device, dataloader_idx: int) -> _Row:
        inputs = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.inputs.items()}
        return replace(batch, inputs=inputs)

    def training_step(self, row: _Row) -> Tensor:
        logits = self.mixture(**row.inputs).logits[row.told].float()
        return functional.kl_div(logits.log_softmax(-1), row.routed, reduction="batchmean", log_target=True)

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.mixture.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=self._settings.learning_rate)
        steps = self._settings.steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
