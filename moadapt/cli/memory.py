"""`moadapt inspect --train`: what a step of a configured training holds in memory, without the base's weights."""

from functools import partial
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from rich.table import Table
from torch import Tensor

from moadapt.bases import outline
from moadapt.cli.trainer import Interface
from moadapt.mixture import Mixture
from moadapt.training.batch import Batch
from moadapt.training.memory import TrainingMemory, training_memory

_ROWS = {
    "base": "frozen base",
    "adapters": "adapters and routers",
    "gradients": "gradients",
    "optimizer": "AdamW's two moments",
    "kept": "activations kept for backward",
    "temporary": "temporary, at the fullest moment",
    "total": "at the fullest moment in all",
}


class MemoryEstimate(Interface):
    """Runs the largest of the first training batches of a configuration through a mixture without numbers.

    Args:
        file: What `moadapt fit -c` takes.
        batches: How many batches are looked at, at least 1.

    Attributes:
        memory: What was found.
        rows: Rows of the batch on one process.
        tokens: Its tokens a row, padding among them.

    Raises:
        ValueError: The configuration is refused, or the base is to be quantised.
    """

    memory: TrainingMemory

    def __init__(self, file: str, batches: int) -> None:
        if batches < 1:
            raise ValueError(f"--batches is {batches}; give at least 1")
        self._batches = batches
        super().__init__(["fit", "-c", file])

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, then let nothing be written, and take the CPU in the place of any other device."""
        super().parse_arguments(parser, args)
        given = self.config["fit"]["trainer"]
        devices = given["devices"]
        count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else 1
        processes = max(1, count) * given["num_nodes"]
        given["accelerator"], given["devices"], given["num_nodes"] = "cpu", processes, 1
        given["strategy"] = "ddp" if processes > 1 else "auto"
        given["logger"], given["callbacks"], given["enable_progress_bar"] = False, None, False
        self.save_config_callback = None

    def _own_callbacks(self, root: Any) -> list[Callback]:
        return []

    def _run_subcommand(self, subcommand: str) -> None:
        """Estimate in the place of a fit."""
        if self.model.quantize is not None:
            raise ValueError(
                f"the base is to be quantised to {self.model.quantize}, and what that takes is not told without its "
                "weights; leave quantize out, and take off what it saves"
            )
        self.model.trainer = self.trainer
        self.trainer.datamodule, self.datamodule.trainer = self.datamodule, self.trainer  # type: ignore[attr-defined]
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        batch = max(self.datamodule.first_batches(self._batches), key=_numbers)
        ids = batch.inputs.get("input_ids")
        self.rows, self.tokens = len(batch), None if ids is None else ids.shape[1]
        accumulates = self.trainer.accumulate_grad_batches > 1
        self.memory = training_memory(self._build, partial(self._loss, batch), accumulates)

    def _build(self) -> Mixture:
        module, kernel = self.model, self.model.attn_implementation
        base = outline(module.base, device="cpu", dtype=module.dtype_name, attn_implementation=kernel)
        module._transformer, module.model = base, module.build(base).train()
        self.trainer.precision_plugin.convert_module(module)
        return module.mixture  # type: ignore[no-any-return]

    def _loss(self, batch: Batch, mixture: Mixture) -> Tensor:
        with self.trainer.precision_plugin.train_step_context():
            losses, counts = self.model.losses(batch)
            loss: Tensor = losses.sum() / counts.sum()
        return loss


def memory_table(found: MemoryEstimate, spell: Any) -> Table:
    """Return a table of what a process holds.

    Args:
        found: The estimate.
        spell: Writes a number of bytes.
    """
    tokens = "" if found.tokens is None else f" of {found.tokens} tokens"
    table = Table(title=f"memory of a process in training, {found.rows} rows{tokens} a batch", title_justify="left")
    table.add_column("what")
    table.add_column("bytes", justify="right")
    for name, what in _ROWS.items():
        if name == "total":
            table.add_section()
        table.add_row(what, spell(getattr(found.memory, name)))
    return table


def _numbers(batch: Batch) -> int:
    return sum(tensor.numel() for tensor in batch.inputs.values())
