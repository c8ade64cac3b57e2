"""What a merge says about itself."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

from moadapt.merging.deltas import Spectrum


class MergeRefusedError(ValueError):
    """A merge is further from the mixture than the caller allows."""


@dataclass(frozen=True)
class MergeReport:
    """How far a merged model is from its mixture.

    Args:
        method: Short name of the merge method.
        tasks: The tasks it was merged for; none where it serves all.
        exact: Whether merged and routed outputs are equal up to rounding, for every input; never where layers of the
            base quantise their inputs too, which a plain weight does not do.
        why: Why it is exact, or is not.
        sites: Relative error of the weight change at each site, by module path: root mean square over calibration
            inputs of the Frobenius distance between routed and merged change, over that of the routed change. Empty
            where routing depends on the input and there was no calibration.
        outputs: The same of what linear sites with experts give, on the inputs of the calibration rows that the merge
            was made from; empty where it is exact.
        held_out_outputs: The same on rows that it was not made from.
        output_kl: Mean Kullback-Leibler divergence, in nats a token (a row, for a classifier of rows), of the merged
            model's distribution from the routed one's; None without calibration or where the base gives no logits.
        top1: Share of tokens (rows) whose likeliest prediction is the same; None likewise.
        held_out: Whether `output_kl` and `top1` were measured on rows that the merge was not made from.
        rows: How many rows they were measured on; 0 without calibration.
        rank: To which the change of every site was cut; None where it was not.
        curve: What cutting the changes of all sites to ranks 0, 1, 2 ... leaves out of them, relative to them, as root
            of the share of squares; empty where nothing was cut.
        before: Scores of the mixture, by `<task>/<score>`; empty where none were asked for.
        after: Scores of the merged model.
        rounding: What storing the plain model rounded away, by name of each parameter that was changed or dequantised:
            Frobenius distance between what is stored and the exact sum of frozen value and change, over the norm of
            that sum. Empty where no model was made.
        total_rounding: The same for all of these parameters taken as one.
        dequantised: Of every quantised layer of the base, by module path, how far its outputs are from those of the
            dequantised weight on standard normal inputs, root mean square relative to the outputs.
    """

    method: str
    tasks: tuple[str, ...]
    exact: bool
    why: str = ""
    sites: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, float] = field(default_factory=dict)
    held_out_outputs: dict[str, float] = field(default_factory=dict)
    output_kl: float | None = None
    top1: float | None = None
    held_out: bool = False
    rows: int = 0
    rank: int | None = None
    curve: tuple[float, ...] = ()
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    total_rounding: float = 0.0
    dequantised: dict[str, float] = field(default_factory=dict)

    @property
    def errors(self) -> dict[str, float]:
        """The error of each site that counts: of its outputs where it was measured, else of its change."""
        return {**self.sites, **self.outputs}

    @property
    def worst(self) -> float:
        """The largest error of a site."""
        return max(self.errors.values(), default=0.0)

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(asdict(self), indent=2)

    def require(self, max_error: float | None) -> None:
        """Refuse the merge where a site is further off than allowed.

        Args:
            max_error: Largest relative error of any site; None allows all.

        Raises:
            MergeRefusedError: The bound is passed; the worst sites are listed.
        """
        if max_error is None or self.worst <= max_error:
            return
        worst = sorted(self.errors.items(), key=lambda item: -item[1])[:3]
        listed = ", ".join(f"{path} {error:.3g}" for path, error in worst)
        raise MergeRefusedError(
            f"merge {self.method!r} is refused: relative errors pass {max_error:g} ({listed}); allow more with "
            "max_error, or merge per task"
        )


def rank_curve(spectra: Mapping[str, Iterable[Spectrum]], longest: int = 128) -> tuple[float, ...]:
    """Return what cutting to ranks 0, 1, 2 ... leaves out of all changes, as root of the share of squares.

    Args:
        spectra: Singular values of the changes, by module path.
        longest: How many ranks are told at most.
    """
    found = [spectrum for own in spectra.values() for spectrum in own]
    whole = sum(spectrum.dropped(0) for spectrum in found)
    if not whole:
        return ()
    ranks = min(longest, max(spectrum.values.shape[-1] for spectrum in found))
    return tuple((sum(spectrum.dropped(r) for spectrum in found) / whole) ** 0.5 for r in range(ranks + 1))
