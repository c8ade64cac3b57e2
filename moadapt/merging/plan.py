"""A merge under way: the merged changes, how far they are from the mixture, the plain model and the report."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moadapt.adapters.delta import Delta
from moadapt.merging.calibration import Batch, as_batches, rows_of_tasks, split_rows
from moadapt.merging.folding import PlainModel
from moadapt.merging.merged_sites import MergedSites
from moadapt.merging.method import MergeMethod, Merging
from moadapt.merging.outputs import agreement, output_errors
from moadapt.merging.report import MergeReport, rank_curve
from moadapt.merging.statistics import adapters_of
from moadapt.mixture import Mixture
from moadapt.registry import MERGES
from moadapt.specs import bind


def plan_merge(
    mixture: Mixture,
    method: str | MergeMethod,
    *,
    task: str | None = None,
    tasks: Sequence[str] | None = None,
    calibration: Batch | Iterable[Batch] | None = None,
    max_error: float | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> "MergePlan":
    """Let a method look at a mixture.

    Args:
        mixture: In evaluation mode.
        method: Short name, with its options, or the method itself.
        task: The one task that the merge serves.
        tasks: Tasks that it serves; None for all.
        calibration: Batches of what the mixture takes; of two or more, every second one is kept to measure on.
        max_error: Bound on the relative error of every site.
        rank: To which every merged change is cut, from 1; None keeps all of it.
        dtype: Number type of the plain model's weights; None keeps the base's.
        options: Of the method.

    Raises:
        ValueError: An option is unknown or out of range, or the method needs rows that are not there.
    """
    if isinstance(method, MergeMethod) and options:
        raise ValueError(f"{method} has its options already, and was given {', '.join(options)} too")
    chosen: MergeMethod = method if isinstance(method, MergeMethod) else bind(MERGES.get(method), options)
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; give at least 1, or None to keep every merged change whole")
    names = served(mixture, task, tasks)
    batches = [] if calibration is None else as_batches(calibration)
    batches = rows_of_tasks(mixture, batches, names) if batches and names else batches
    used, held_out, fresh = split_rows(batches)
    merging = Merging(mixture, names, used)
    check_rows(chosen, merging)
    return MergePlan(chosen, merging, held_out=held_out, fresh=fresh, max_error=max_error, rank=rank, dtype=dtype)


def check_rows(method: MergeMethod, merging: Merging) -> None:
    """Refuse a merge that lacks the rows it looks at.

    Args:
        method: How to merge.
        merging: What.

    Raises:
        ValueError: There are none, or they have no labels or tasks.
    """
    name = MERGES.name_of(type(method))
    varies = merging.fixed is None and merging.mixture.spec.router is not None
    if not merging.rows and (method.always_reads_rows or (method.reads_rows and varies)):
        router = type(merging.mixture.spec.router).__name__
        why = "looks at rows" if method.always_reads_rows else f"averages what {router} decides input by input"
        of = f"batches of the rows of {', '.join(merging.tasks)}" if merging.tasks else "batches of what it will meet"
        raise ValueError(f"merge {name!r} {why}: give calibration=, {of}")
    for key, needed in (("labels", method.reads_labels), ("task", method.reads_tasks)):
        if needed and any(batch.get(key) is None for batch in merging.rows):
            raise ValueError(f"merge {name!r} needs {key!r} in every calibration batch")


class MergePlan:
    """A merge of every site, ready to be folded.

    Args:
        method: How to merge.
        merging: What; the mixture stays usable.
        held_out: Batches to measure the outputs on.
        fresh: Whether the merge was not made from those batches.
        max_error: Bound on the relative error of every site.
        rank: To which every merged change is cut; None keeps all of it.
        dtype: Number type of the plain model; None keeps the base's.
    """

    def __init__(
        self,
        method: MergeMethod,
        merging: Merging,
        *,
        held_out: Sequence[Batch] = (),
        fresh: bool = False,
        max_error: float | None = None,
        rank: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.mixture, self._merging = merging.mixture, merging
        self._name, self._sites = MERGES.name_of(type(method)), MergedSites(merging, method.prepare(merging), rank)
        self._held_out, self._fresh, self._rank, self._dtype = held_out, fresh, rank, dtype
        self._max_error = max_error

    @cached_property
    def deltas(self) -> dict[str, list[Delta]]:
        """What is added at every site, by module path."""
        return {at.site.path: self._sites.merge(at) for at in adapters_of(self.mixture)}

    def model(self) -> PreTrainedModel:
        """Return the merged plain model.

        Raises:
            MergeRefusedError: A site's error passes the bound.
            NotMergeable: A family is no affine map.
            ValueError: A site's weight cannot take a change.
        """
        return self._plain.model

    def report(self) -> MergeReport:
        """Return how far the merge is from the mixture.

        Raises:
            MergeRefusedError: A site's error passes the bound.
        """
        rows = sum(int(next(v for v in batch.values() if isinstance(v, Tensor)).shape[0]) for batch in self._held_out)
        found = agreement(self.mixture, self.model(), self._held_out) if self._held_out else None
        report = replace(
            self._judged,
            output_kl=None if found is None else found.kl,
            top1=None if found is None else found.top1,
            held_out_outputs=self._outputs(self._held_out) if self._fresh else {},
            held_out=self._fresh,
            rows=rows,
        )
        return self._plain.told(report) if "_plain" in vars(self) else report

    def require(self) -> None:
        """Refuse the merge where a site's error passes the bound.

        Raises:
            MergeRefusedError: One does.
        """
        self._judged.require(self._max_error)

    @cached_property
    def _judged(self) -> MergeReport:
        """What is known before anything is folded."""
        assert self.deltas is not None, "which finds the errors of sites"
        errors, unknown = self._sites.errors, self._merging.fixed is None and not self._merging.rows
        if unknown and self._max_error is not None:
            raise ValueError("how far this merge is from the routing shows on rows alone; max_error needs calibration=")
        exact = self._merging.fixed is not None and not any(errors.values())
        return MergeReport(
            self._name,
            self._merging.tasks,
            exact,
            why(self._merging, self._name, self._rank, exact=exact),
            sites={} if unknown else errors,
            outputs={} if exact or unknown else self._outputs(self._merging.rows),
            rank=self._rank,
            curve=rank_curve(self._sites.spectra),
        )

    @cached_property
    def _plain(self) -> PlainModel:
        self.require()
        with self.mixture.bare_base() as base:
            made = PlainModel(base, self._dtype)
        for path, deltas in self.deltas.items():
            made.fold(path, deltas)
        made.settle(self.mixture.required_grad)
        return made

    def _outputs(self, rows: Sequence[Batch]) -> dict[str, float]:
        return output_errors(self.mixture, self.deltas, rows) if rows and self.mixture.places else {}


def why(merging: Merging, name: str, rank: int | None, *, exact: bool) -> str:
    """Say why a merge is exact, or is not.

    Args:
        merging: What was merged.
        name: Of the method.
        rank: To which changes were cut.
        exact: Whether it is.
    """
    if exact:
        return "every input that it serves is routed alike, and the merge weighs experts just so"
    if merging.fixed is None:
        router = type(merging.mixture.spec.router).__name__
        return f"{router} weighs experts anew for each input, and a weight is one for all"
    cut = f", and was cut to rank {rank}" if rank is not None else ""
    return f"every input that it serves is routed alike, but {name} makes another change of that{cut}"


def served(mixture: Mixture, task: str | None, tasks: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the tasks that a merge serves, none for all.

    Args:
        mixture: What is merged.
        task: One task.
        tasks: Several; None for all.

    Raises:
        ValueError: Both ways of naming them were used, or one is unknown.
    """
    if task is not None and tasks is not None:
        raise ValueError(f"got task={task!r} and tasks={list(tasks)}; give one of them")
    names = tuple(tasks or ()) if task is None else (task,)
    known, router = (*mixture.tasks, *mixture.experts), mixture.spec.router
    strict = router is not None and not router.takes_unknown_tasks
    unknown = [name for name in names if strict and name not in known]
    if unknown:
        raise ValueError(f"no task is called {unknown[0]!r}; there are {', '.join(dict.fromkeys(known))}")
    return names
