"""The data module: several tasks, mixed in every batch."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import lightning
from transformers import AutoConfig

from moadapt.bases import base_folder, class_names, decoder_start
from moadapt.processors import load_processor
from moadapt.sampling import Proportional, Sampler
from moadapt.task import BadExample, Dataset, Example, Task
from moadapt.training.answers import AnswerWriter
from moadapt.training.batch import Batch
from moadapt.training.classes import ClassCollator
from moadapt.training.collate import Collator
from moadapt.training.lengths import row_lengths
from moadapt.training.loaders import EvaluationLoader, Rows, TrainLoader
from moadapt.training.order import Budget, MixedOrder

_LOG = logging.getLogger(__name__)
_SHOWN = 10
_STAGES = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("test",)}


class MixedTasks(lightning.LightningDataModule):
    """Rows of several tasks. Every training batch mixes them; evaluation goes task by task.

    Args:
        base: Name of the base, whose processor makes the batches; a registered short name, a folder or a hub name.
        tasks: Tasks by name; where a router goes by task, by the names of its experts. Either this or `dataset`.
        dataset: Data that knows its tasks.
        batch_size: Rows of a training step, over all processes; with `batch_tokens` the most of them.
        eval_batch_size: Rows that one process generates answers for at a time; None is `batch_size`.
        sampling: Which share of the training rows each task gets; by default in proportion to their numbers of rows.
        one_task: Whether each training batch holds rows of one task, the tasks taking turns, or mixes them.
        batch_tokens: Most tokens of a training step, over all processes and padding included; the rows' lengths are
            measured when training starts. None takes `batch_size` rows, however long.
        batch_multiple: With `batch_tokens`, what the rows of a step are a multiple of; the number of processes must
            divide it, so that each keeps to its part of the tokens.
        num_workers: Processes that prepare batches ahead; 0 prepares them in this one.
        seed: Of order and chosen answers, from 0.
        on_bad_example: What to do when entries of the files cannot be used: `raise` before anything is trained, or, of
            data that is read while it is trained on, when one is met; or `skip` them.

    Raises:
        ValueError: Not exactly one of `tasks` and `dataset` is given, or a number is out of range.
    """

    def __init__(
        self,
        base: str,
        tasks: dict[str, Task] | None = None,
        dataset: Dataset | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        sampling: Sampler | None = None,
        one_task: bool = False,
        batch_tokens: int | None = None,
        batch_multiple: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        on_bad_example: Literal["raise", "skip"] = "raise",
    ) -> None:
        super().__init__()
        if bool(tasks) == (dataset is not None):
            given = "both" if tasks else "neither"
            raise ValueError(f"the data got {given} of tasks and dataset; give exactly one of them")
        for name, number, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("batch_tokens", batch_tokens, 1),
            ("batch_multiple", batch_multiple, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if number is not None and number < least:
                raise ValueError(f"{name} is {number}; give at least {least}")
        self.base, self.dataset, self.batch_size, self.sampler = base, dataset, batch_size, sampling or Proportional()
        self.one_task, self.batch_tokens, self.batch_multiple = one_task, batch_tokens, batch_multiple
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers, self.seed, self.on_bad_example = num_workers, seed, on_bad_example
        self.tasks: Mapping[str, Task] = dict(tasks or {})
        self.skipped: dict[str, list[BadExample]] = {}
        self._rows: dict[str, Rows] = {}
        self._collators: dict[bool, Collator | ClassCollator] = {}
        self._order: MixedOrder | None = None
        self._loader: TrainLoader | None = None
        self._resumed: dict[str, Any] | None = None

    @cached_property
    def processor(self) -> Any:
        """The base's processor."""
        return load_processor(base_folder(self.base), self._config)

    @cached_property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes where the base classifies, see `moadapt.bases.class_names`; None where it writes."""
        return class_names(self._config)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the processor, with a padding token."""
        return self.answers.tokenizer

    @property
    def answers(self) -> AnswerWriter:
        """What turns answers into tokens, and tokens into answers.

        Raises:
            ValueError: The base classifies, and writes nothing.
        """
        collator = self._collator(answers=False)
        if isinstance(collator, ClassCollator):
            raise ValueError(f"the base {self.base!r} classifies, so there is no text of it to read or to write")
        return collator.written

    def prepare_data(self) -> None:
        """Let the data set write its files; runs once a machine."""
        if self.dataset is not None:
            self.dataset.prepare()

    def setup(self, stage: str) -> None:
        """Read the splits that a stage needs, all of them before it starts.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.

        Raises:
            ValueError: A file is missing, a task has no rows, entries cannot be used and `on_bad_example` is `raise`,
                or the sampler follows validations and the training has none.
        """
        if stage == "fit" and self.sampler.reads and self.trainer is not None and not self.trainer.limit_val_batches:
            raise ValueError(
                f"{type(self.sampler).__name__} follows validations, and limit_val_batches is 0, so there are none; "
                "give another, or another sampler"
            )
        if self.dataset is not None and not self.tasks:
            self.tasks = self.dataset.prepare()
        splits = [split for split in _STAGES[stage] if split not in self._rows]
        read = {(split, name): task.read(split) for split in splits for name, task in self.tasks.items()}
        self._judge({f"{name}, {split}": bad for (split, name), (_, bad) in read.items() if bad})
        for split in splits:
            found = {name: _some(name, split, read[split, name][0]) for name in self.tasks}
            self._rows[split] = Rows(found, skip=self.on_bad_example == "skip")

    def train_dataloader(self) -> TrainLoader:
        """Give training batches from step 0, or from where a checkpoint was taken."""
        self._loader = self._train_loader()
        if self._resumed is not None:
            self._loader.load_state_dict(self._resumed)
            self._resumed = None
        return self._loader

    def first_batches(self, count: int) -> Iterator[Batch]:
        """Give the first training batches, every process's share of each; training does not move on by it.

        Args:
            count: How many steps' batches.
        """
        return self._train_loader().first(count)

    def answered(self, split: str) -> EvaluationLoader:
        """Give every row of a split once, with its answer.

        Args:
            split: `train`, `validation` or `test`.
        """
        return self._evaluation(split, answers=True)

    def val_dataloader(self) -> EvaluationLoader:
        """Give every row of the validation split once."""
        return self._evaluation("validation")

    def test_dataloader(self) -> EvaluationLoader:
        """Give every row of the test split once."""
        return self._evaluation("test")

    def predict_dataloader(self) -> EvaluationLoader:
        """Give every row of the test split once."""
        return self._evaluation("test")

    def state_dict(self) -> dict[str, Any]:
        """Return where training stands in the data."""
        return {} if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training go on where a checkpoint was taken.

        Lightning would restore the loader itself, but not when something has asked for its length before.
        """
        self._resumed = state_dict or None

    def follow(self, found: Mapping[str, float]) -> None:
        """Let the sampler know what a validation found, from the next training batch on.

        Args:
            found: What `sampler.reads` names, by task; the same on all processes.
        """
        assert self._loader is not None, "a validation within a training"
        self._loader.follow(found)

    def examples(self, split: str) -> list[Example]:
        """Return all rows of a split that `setup` read, one task after the other.

        Args:
            split: `train`, `validation` or `test`.
        """
        return list(chain.from_iterable(self._rows[split].tasks))

    def _train_loader(self) -> TrainLoader:
        rows = self._rows["train"]
        if self._order is None:
            budget = None if self.batch_tokens is None else self._budget(self.batch_tokens)
            self._order = MixedOrder(
                rows.sizes, self.batch_size, self.sampler, self.seed, one_task=self.one_task, budget=budget
            )
        limit = None if self.trainer is None else _limited(self._order.steps, self.trainer.limit_train_batches)
        return TrainLoader(rows, self._order, self._collator(answers=True), self.num_workers, *self._process(), limit)

    def _budget(self, tokens: int) -> Budget:
        """Measure the training rows, each process its part of them."""
        rows, collator = self._rows["train"], self._collator(answers=True)
        lengths = row_lengths(rows, collator, self.num_workers, *self._process())
        if self.trainer is not None:
            strategy = self.trainer.strategy
            lengths = strategy.reduce(lengths.to(strategy.root_device), reduce_op="sum").cpu()
        return Budget(tokens, self.batch_multiple, lengths.numpy())

    def _evaluation(self, split: str, *, answers: bool = False) -> EvaluationLoader:
        collator = self._collator(answers=answers)
        return EvaluationLoader(self._rows[split], collator, self.eval_batch_size, self.num_workers, *self._process())

    def _collator(self, *, answers: bool) -> Collator | ClassCollator:
        if answers not in self._collators:
            self._collators[answers] = self._new_collator(answers)
        return self._collators[answers]

    def _new_collator(self, answers: bool) -> Collator | ClassCollator:
        if self.classes is not None:
            return ClassCollator(self.processor, self.classes, answers=answers)
        start = decoder_start(self._config)
        return Collator(self.processor, seed=self.seed, answers=answers, decoder_start=start)

    @cached_property
    def _config(self) -> Any:
        return AutoConfig.from_pretrained(base_folder(self.base))

    def _process(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _judge(self, bad: Mapping[str, list[BadExample]]) -> None:
        """Refuse or report entries that cannot be used."""
        self.skipped |= bad
        if not bad:
            return
        every = [f"{where}: {entry}" for where, entries in bad.items() for entry in entries]
        shown = "\n  ".join(every[:_SHOWN] + [f"and {len(every) - _SHOWN} more"] * (len(every) > _SHOWN))
        count = "1 entry" if len(every) == 1 else f"{len(every)} entries"
        if self.on_bad_example == "raise":
            raise ValueError(f"{count} cannot be used:\n  {shown}\nmend the files, or give on_bad_example: skip")
        _LOG.warning("%s cannot be used; skipped:\n  %s", count, shown)


def _limited(steps: int, limit: int | float) -> int:
    """Return the steps of a pass that Lightning cuts short: a number of them, or a share of an epoch's."""
    return max(1, min(steps, limit) if isinstance(limit, int) else int(steps * limit))


def _some(name: str, split: str, examples: Sequence[Example]) -> Sequence[Example]:
    if not len(examples):
        raise ValueError(f"task {name!r} has no usable rows in its {split} split; give it files that have some")
    return examples
