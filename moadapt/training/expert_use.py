"""What an expert's gradient is a mean over: the whole batch, or the rows of it that used the expert.

The gradient of the batch's mean loss gives an expert little where few rows used it. Divided by the answer tokens of
those rows instead, it is as large as in a batch that used the expert throughout, so that a rare expert counts in a step
as much as a common one. Counts are those of all processes and accumulated batches.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from moadapt.mixture import Mixture
from moadapt.routed import inputs_of_rows
from moadapt.tracing import Observation


class ExpertUse:
    """Counts the answer tokens of the rows that used each expert at each place, since the last step.

    A row counts by the share of its inputs there at which the expert had any weight: under routing by rows wholly or
    not at all, under routing by tokens in part.

    Args:
        mixture: The mixture in training.
    """

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self.counts: Tensor | None = None
        """Of this process, (places, E); None where no batch was counted yet."""

    @torch.no_grad()
    def add(self, observed: Iterable[Observation], counts: Tensor) -> None:
        """Count the rows of one batch.

        Args:
            observed: What the routers decided; several passes, or runs of a tower, count together.
            counts: Answer tokens of every row, (B,).
        """
        places, experts = [place.name for place in self._mixture.places], len(self._mixture.experts)
        rows = torch.zeros(len(places), len(counts), experts + 1, device=counts.device)
        for each in observed:
            used, inputs = inputs_of_rows(each, len(counts))
            rows[places.index(each.place)] += torch.cat([used, inputs.unsqueeze(1)], dim=1)
        shares = rows[..., :-1] / rows[..., -1:].clamp(min=1)
        own = torch.einsum("pbe,b->pe", shares, counts.to(shares))
        self.counts = own if self.counts is None else self.counts + own

    @torch.no_grad()
    def normalise(self, tokens: Tensor, reduce: Callable[[Tensor], Tensor]) -> None:
        """Turn experts' gradients from those of the mean over the batch into those over the rows that used them.

        Args:
            tokens: Answer tokens of the step, over all processes and accumulated batches, a scalar.
            reduce: Sums a tensor over processes.
        """
        if self.counts is None:
            return
        counts, self.counts = reduce(self.counts), None
        factors = torch.where(counts > 0, tokens / counts, 1.0)
        at = {path: index for index, place in enumerate(self._mixture.places) for path in place.sites}
        for site, bank in self._mixture.banks():
            for name, owners in bank.expert_rows().items():
                _scale(bank.get_parameter(name).grad, factors[at[site.path]], owners)


def _scale(gradient: Tensor | None, factors: Tensor, owners: Tensor) -> None:
    if gradient is not None:
        rows = factors[owners.to(factors.device)].to(gradient)
        gradient.mul_(rows.view(-1, *[1] * (gradient.ndim - 1)))
