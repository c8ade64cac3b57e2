"""Merge for all inputs at once: each site gets its mean routing over calibration rows."""

from collections.abc import Iterable, Sequence

from moadapt.merging.calibration import Batch, as_batches, moments
from moadapt.merging.plan import MergePlan
from moadapt.mixture import Mixture
from moadapt.registry import MERGES


@MERGES.register("mean_routing")
class MeanRouting:
    """Fold the average of what the routers do into the base."""

    def plan(
        self, mixture: Mixture, *, calibration: Batch | Iterable[Batch], max_error: float | None = None
    ) -> MergePlan:
        """Average the routing.

        Args:
            mixture: What to merge.
            calibration: Batches of what the mixture takes; with two or more, every second one is kept to measure the
                outputs on.
            max_error: Bound on the relative error of every site.
        """
        used, held_out, fresh = split_rows(as_batches(calibration))
        found = moments(mixture, used) if mixture.places else {}
        weights = {place: moment.mean.float() for place, moment in found.items()}
        spec = mixture.spec.router
        return MergePlan(
            mixture,
            "mean_routing",
            weights,
            task=None,
            exact=spec is None or spec.depends_on == "nothing",
            found=found,
            held_out=held_out,
            fresh=fresh,
            max_error=max_error,
        )


def split_rows(batches: Sequence[Batch]) -> tuple[Sequence[Batch], Sequence[Batch], bool]:
    """Split batches into those a merge is made from and those it is measured on.

    Returns:
        Both parts, and whether they differ; a single batch serves for both.
    """
    if len(batches) == 1:
        return batches, batches, False
    return batches[::2], batches[1::2], True
