"""Merge for one task: exact where routing depends on the task only, else that task's mean routing."""

from dataclasses import dataclass

from moadapt.merging.method import Blend, MergeMethod, Merging
from moadapt.registry import MERGES


@MERGES.register("task")
@dataclass(frozen=True, kw_only=True)
class TaskMerge(MergeMethod):
    """Folds one task's adapters in, as the routers weigh them for it; exact where they go by the task."""

    def prepare(self, merging: Merging) -> Blend:
        """Find the weights.

        Raises:
            ValueError: There are experts, and not one task.
        """
        mixture = merging.mixture
        if mixture.spec.router is not None and len(merging.tasks) != 1:
            raise ValueError(f"merge 'task' needs task=, one of {', '.join(mixture.tasks)}")
        return Blend(merging.by_site(merging.weights()))
