"""What a merge says about itself."""

import json
from dataclasses import asdict, dataclass, field


class MergeRefusedError(ValueError):
    """A merge is further from the mixture than the caller allows."""


@dataclass(frozen=True)
class MergeReport:
    """How far a merged model is from its mixture.

    Args:
        method: Short name of the merge method.
        task: The task it was merged for; None where it serves all.
        exact: Whether merged and routed outputs are equal up to rounding, for every input; never where layers of the
            base quantise their inputs too, which a plain weight does not do.
        sites: Relative error of the weight change at each site, by module path: root mean square over calibration
            inputs of the Frobenius distance between routed and merged change, over that of the routed change.
        output_kl: Mean Kullback-Leibler divergence, in nats a token (a row, for a classifier of rows), of the merged
            model's distribution from the routed one's; None without calibration or where the base gives no logits.
        held_out: Whether `output_kl` was measured on rows that the merge was not made from.
        rows: How many rows `output_kl` was measured on; 0 without calibration.
        rounding: What storing the plain model rounded away, by name of each parameter that was changed or dequantised:
            Frobenius distance between what is stored and the exact sum of frozen value and change, over the norm of
            that sum. Empty where no model was made.
        total_rounding: The same for all of these parameters taken as one.
        dequantised: Of every quantised layer of the base, by module path, how far its outputs are from those of the
            dequantised weight on standard normal inputs, root mean square relative to the outputs.
    """

    method: str
    task: str | None
    exact: bool
    sites: dict[str, float] = field(default_factory=dict)
    output_kl: float | None = None
    held_out: bool = False
    rows: int = 0
    rounding: dict[str, float] = field(default_factory=dict)
    total_rounding: float = 0.0
    dequantised: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest site error."""
        return max(self.sites.values(), default=0.0)

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
        worst = sorted(self.sites.items(), key=lambda item: -item[1])[:3]
        listed = ", ".join(f"{path} {error:.3g}" for path, error in worst)
        raise MergeRefusedError(
            f"merge {self.method!r} is refused: relative errors pass {max_error:g} ({listed}); allow more with "
            "max_error, or merge per task"
        )
