"""What training modules share: answer loss over mixed batches, scores task by task, small checkpoints."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from moadapt.bases import load_base
from moadapt.training.answers import AnswerWriter
from moadapt.training.batch import Batch
from moadapt.training.data import MixedTasks
from moadapt.training.following import follow_validation
from moadapt.training.loss import answer_logits, row_losses
from moadapt.training.noise import keyed_noise
from moadapt.training.optimization import Optimization, check_groups, parameter_groups
from moadapt.training.optimizer import ExpertAdamW
from moadapt.training.reduction import add_up_gradients
from moadapt.training.roles import Role
from moadapt.training.scores import Answered, Scores
from moadapt.training.sharding import FSDP2Strategy
from moadapt.training.unfreezing import Unfreezing, drop_gradients


class TaskModule(lightning.LightningModule, ABC):
    """Trains adapters on a frozen base with the rows of `MixedTasks`.

    The loss is the mean over the answer tokens of the global batch: all processes and accumulated batches together.

    Args:
        base: Name of the base; a registered short name, a folder or a hub name.
        optimization: Settings of the optimiser.
        dtype: Number type of the base's weights, such as `float32` or `bfloat16`; `auto` takes the file's own.
        attn_implementation: One of transformers' attention kernels.
        seed: Of dropout and routers' noise, from 0.
        quantize: How to quantise the base's linear layers while it is loaded: `int8`, `int4`, `nf4` or `llm_int8`, see
            `moadapt.bases.load_base`; None loads them as they were written.
    """

    def __init__(
        self,
        base: str,
        optimization: Optimization,
        dtype: str,
        attn_implementation: str | None,
        seed: int,
        quantize: str | None = None,
    ) -> None:
        super().__init__()
        self.base, self.optimization, self.seed = base, optimization, seed
        self.dtype_name, self.attn_implementation, self.quantize = dtype, attn_implementation, quantize
        self.model: nn.Module | None = None
        self._transformer: PreTrainedModel | None = None
        self._scores: Scores | None = None
        self.skips = False
        """Whether the step under way is not taken, its gradients dropped; see `moadapt.training.bad_steps`."""
        self._nominal: Tensor | None = None
        self._tokens: Tensor | None = None
        self._unfreezing: Unfreezing | None = None
        self.on_gradients: Callable[[], None] | None = None
        """Called when the gradients of a step are whole, and before they are clipped."""

    @abstractmethod
    def build(self, base: PreTrainedModel) -> nn.Module:
        """Put the adapters on the base and return what takes its calls."""

    @abstractmethod
    def options(self, batch: Batch) -> dict[str, Any]:
        """Return what a call of the model needs besides the base's inputs."""

    @abstractmethod
    def roles(self) -> dict[nn.Parameter, Role]:
        """Return every trained parameter, with what it is."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds: the adapters, not the base."""

    @abstractmethod
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a checkpoint's tensors in.

        Raises:
            ValueError: Names or shapes differ.
        """

    def stacks(self) -> list[dict[nn.Parameter, Tensor]]:
        """Return for each bank its stacked parameters, with the expert of every row."""
        return []

    def weigh(self, losses: Tensor, counts: Tensor, tasks: Tensor) -> Tensor:
        """Return the losses of rows as they count in training, (B,); by default as they are.

        Args:
            losses: Sum of the losses of each row's tokens, (B,).
            counts: How many tokens these are, (B,).
            tasks: Index of each row's task, (B,).
        """
        return losses

    def observe_tasks(self, sums: Tensor) -> None:
        """Look at the losses of a batch on all processes.

        Args:
            sums: Of the losses of each task, not weighted, and how many tokens these are, (2, S).
        """

    def expert_names(self) -> tuple[str, ...]:
        """Return the names of the experts, by the index that `stacks` tells rows by."""
        return ()

    def penalty(self, tokens: Tensor) -> Tensor | None:
        """Return what joins the loss of the last batch besides its answers, over all processes; None where nothing.

        Its gradients are this process's share.

        Args:
            tokens: How many answer tokens the batch has on all processes, a scalar.
        """
        return None

    def readings(self) -> dict[str, float]:
        """Return numbers about the adapters that are worth a line in the log, by name."""
        return {}

    def setup(self, stage: str) -> None:
        """Refuse strategies that would spread adapters over processes.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.

        Raises:
            ValueError: The strategy is one of them.
        """
        if isinstance(self.trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise ValueError(
                f"strategy is {type(self.trainer.strategy).__name__}, which would spread adapters over processes; give "
                "ddp, or fsdp2, which spreads the base alone"
            )

    def configure_model(self) -> None:
        """Load the base and build on it, once."""
        if self.model is None:
            self._transformer = self.load_base()
            self.model = self.build(self._transformer).train()

    def load_base(self) -> PreTrainedModel:
        """Load the base afresh, by the settings of this module."""
        kernel = self.attn_implementation
        return load_base(self.base, dtype=self.dtype_name, attn_implementation=kernel, quantize=self.quantize)[0]

    def losses(self, batch: Batch, *key: int) -> tuple[Tensor, Tensor]:
        """Return the summed loss of every row's answer and its count of tokens, (B,), with the noise of the step.

        Args:
            batch: The rows.
            key: Numbers from 0 that tell the noise of several passes apart.
        """
        with keyed_noise(self.device, self.seed, batch.step, self.global_rank, *key):
            keeps = "logits_to_keep" in inspect.signature(self.transformer.forward).parameters
            logits = answer_logits(self.model, batch.cast(self.transformer.dtype), keeps, **self.options(batch))
            losses, counts = row_losses(logits, batch)
        return (losses * 0, counts * 0) if batch.spare else (losses, counts)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of this process's share of the step."""
        losses, counts = self.losses(batch)
        names = list(self.data.tasks)
        index = batch.task_ids(names)
        sums = losses.new_zeros(2, len(names))
        sums[0].index_add_(0, index, losses.detach())
        sums[1].index_add_(0, index, counts.to(sums))
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        self.task_sums = sums
        tokens = sums[1].sum()
        if self._nominal is None:  # the first batch of those whose gradients are accumulated
            self._nominal, self._tokens = tokens, torch.zeros_like(tokens)
        assert self._tokens is not None, "set with the first batch"
        self._tokens = self._tokens + tokens
        loss = self.weigh(losses, counts, index).sum() / self._nominal
        penalty = self.penalty(tokens)
        if penalty is not None:  # of accumulated batches each counts by its tokens, as the loss does
            loss = loss + penalty * (tokens / self._nominal)
        self.observe_tasks(sums)
        return loss

    def on_train_start(self) -> None:
        """Take the gradients of all processes over from DDP; see `moadapt.training.reduction`."""
        wrapped = self.trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.require_backward_grad_sync = False  # what its `no_sync` sets

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Take a step with the gradients of all processes.

        They are added up before anything looks at them: what scales them for half precision, the norm, what clips.
        """
        assert optimizer_closure is not None, "Lightning gives one"

        def closure() -> Any:
            loss = optimizer_closure()
            if self.trainer.world_size > 1:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                add_up_gradients(parameters, partial(self.trainer.strategy.reduce, reduce_op="sum"))
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn accumulated gradients into those of the mean over all their tokens."""
        accumulated = self.trainer.accumulate_grad_batches
        assert self._nominal is not None, "a step follows a batch"
        assert self._tokens is not None, "a step follows a batch"
        if accumulated > 1:
            factor = self._nominal * accumulated / self._tokens
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor.to(parameter.grad.dtype))
        self._nominal = None

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Leave out what stands still yet, show what is left, then clip it."""
        assert self._unfreezing is not None, "optimizers were configured"
        drop_gradients(self._unfreezing.still(self.trainer.global_step, self.trainer.current_epoch))
        if self.on_gradients is not None:
            self.on_gradients()
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the loss of the step and of each task in it, and now and then what the adapters tell."""
        losses, counts = self.task_sums.tolist()
        self.log("loss", sum(losses) / sum(counts), prog_bar=True)
        for name, loss, count in zip(self.data.tasks, losses, counts, strict=True):
            if count:
                self.log(f"loss/{name}", loss / count)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.trainer.global_step % every == 0:  # reading them waits for the device
            self.log_dict(self.readings())

    def configure_optimizers(self) -> Any:
        """AdamW over groups by tower and kind; warm-up and schedule step by step."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf") and self.optimization.schedule == "cosine":
            raise ValueError("a cosine needs an end; give the trainer max_steps or max_epochs, or schedule: constant")
        roles, epochs = self.roles(), self.trainer.max_epochs
        ends = epochs if epochs is not None and epochs >= 0 else None
        self._unfreezing = Unfreezing(self.optimization.unfreezing, roles, steps, ends)
        groups = parameter_groups(roles, self.optimization)
        check_groups(groups, self)
        optimizer = ExpertAdamW(groups, self.stacks(), betas=self.optimization.betas)
        factor = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.optimization.factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step"}}

    def on_validation_epoch_start(self) -> None:
        """Start new scores."""
        self._scores = Scores(self.data.tasks, self.device)

    def on_test_epoch_start(self) -> None:
        """Start new scores."""
        self._scores = Scores(self.data.tasks, self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Generate answers and count them."""
        self._score(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Generate answers and count them."""
        self._score(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Return every row with the model's text, the task's prediction and the reference."""
        return [row.record() for row in self.answer(batch)]

    def on_validation_epoch_end(self) -> None:
        """Log every `<task>/<score>` and their mean, and let the sampler follow them, if it does."""
        follow_validation(self, self._log_scores())

    def on_test_epoch_end(self) -> None:
        """Log every `<task>/<score>` and their mean."""
        self._log_scores()

    def answer(self, batch: Batch) -> list[Answered]:
        """Generate the answers of a batch of one task, greedily; a base that classifies gives the likeliest class.

        Args:
            batch: Prompts, padded on the left.
        """
        if not len(batch):
            return []
        tasks, texts = self.data.tasks, self._classified(batch) if batch.classes else self._written(batch)
        if batch.spare:
            return []
        rows = zip(batch.task_names, batch.rows.tolist(), batch.examples, strict=True)
        return [
            Answered(name, row, example, text, tasks[name].parse(text, example))
            for (name, row, example), text in zip(rows, texts, strict=True)
        ]

    def _classified(self, batch: Batch) -> list[str]:
        logits = answer_logits(self.model, batch.cast(self.transformer.dtype), False, **self.options(batch))
        return [batch.classes[index] for index in logits[:, 0].argmax(dim=-1).tolist()]

    def _written(self, batch: Batch) -> list[str]:
        tasks, answers = self.data.tasks, self.data.answers
        generate: Any = self.model.generate  # type: ignore[union-attr]
        synced = {"synced_gpus": True} if isinstance(self.trainer.strategy, FSDP2Strategy) else {}
        written = generate(
            **batch.cast(self.transformer.dtype).inputs,
            **self.options(batch),
            **synced,  # a process whose answers are written goes on until all others' are
            do_sample=False,
            max_new_tokens=tasks[batch.task_names[0]].max_new_tokens,
            pad_token_id=answers.tokenizer.pad_token_id,
            eos_token_id=_ends(self.transformer, answers),
        )
        prompt = 0 if self.transformer.config.is_encoder_decoder else batch.inputs["input_ids"].shape[1]
        return [answers.text(tokens) for tokens in written[:, prompt:].tolist()]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return adapters and routers, not the base."""
        return dict(self.tensors())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy adapters and routers in; every one must be there.

        Raises:
            ValueError: Names or shapes differ from this module's.
        """
        self.configure_model()
        self.load_tensors(state_dict)
        return nn.modules.module._IncompatibleKeys([], [])

    @property
    def transformer(self) -> PreTrainedModel:
        """The transformers model underneath."""
        assert self._transformer is not None, "configure_model was called"
        return self._transformer

    @property
    def data(self) -> MixedTasks:
        """The data module in use."""
        found = getattr(self.trainer, "datamodule", None)
        if not isinstance(found, MixedTasks):
            raise ValueError(f"{type(self).__name__} needs the tasks; give the trainer datamodule=MixedTasks(...)")
        return found

    def _score(self, batch: Batch) -> None:
        assert self._scores is not None, "the epoch was started"
        self._scores.update(self.answer(batch))

    def _log_scores(self) -> dict[str, float]:
        assert self._scores is not None, "the epoch was started"
        found = self._scores.compute()
        for name, value in found.items():
            self.log(name, value)
        return found


def _ends(transformer: PreTrainedModel, answers: AnswerWriter) -> Sequence[int]:
    """Return the tokens that end an answer: that of the training, and those that the base generates until."""
    own = getattr(transformer.generation_config, "eos_token_id", None)
    return sorted({answers.end, answers.tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])})
