"""`moadapt search`: the sites where the LoRAs of a mixture are needed, by gates that train or by one look at gradients.

It takes what `moadapt fit` takes and works in `search/` within the run's folder, so that the fit after it starts anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from moadapt.cli.callbacks import ShowScores
from moadapt.cli.found_sites import FoundSites
from moadapt.cli.trainer import Interface, written
from moadapt.ranks import Gates
from moadapt.ranks.allocator import highest
from moadapt.ranks.gates import GateDriver, budget_of
from moadapt.specs import fields_of
from moadapt.training.kept import LAST, read_checkpoint
from moadapt.training.probe import ProbeSites

FOLDER = "search"


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How sites are searched.

    Args:
        mode: `gates` trains with a gate at every site; `probe` trains nothing and compares gradients.
        budget: Parameters that are kept at most: up to 1 a share of all LoRAs', above that a number.
        price: Of gates: what all parameters together may cost, in the unit of the loss.
        learning_rate: Of gates.
        batches: Of the probe: how many training batches it reads.

    Raises:
        ValueError: A number is out of range.
    """

    mode: Literal["gates", "probe"] = "gates"
    budget: float = 0.5
    price: float = 0.1
    learning_rate: float = 0.05
    batches: int = 8

    def __post_init__(self) -> None:
        """Check ranges; those of gates are checked by the gates."""
        if self.batches < 1:
            raise ValueError(f"search.batches is {self.batches}; give at least 1")
        self.gates()

    def gates(self) -> Gates:
        """Return gates that train along until the end."""
        return Gates(budget=self.budget, price=self.price, learning_rate=self.learning_rate, until=1.0)


class Search(Interface):
    """Runs a fit whose only yield is the sites to keep, and writes them down.

    Args:
        arguments: Those of `fit`, and settings of the search.
    """

    def __init__(self, arguments: list[str]) -> None:
        self._probe: ProbeSites | None = None
        super().__init__(arguments)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings of the search."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(SearchSettings, "search")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, then move the run into its folder and let the search alone choose ranks.

        Raises:
            ValueError: It cannot be parsed, or a setting of the search is out of range.
        """
        super().parse_arguments(parser, args)
        given = self.config["fit"]
        settings = SearchSettings(**vars(given["search"]))
        given["trainer"]["default_root_dir"] = str(Path(given["trainer"]["default_root_dir"]) / FOLDER)
        if settings.mode == "gates":
            gates = settings.gates()
            path = f"{Gates.__module__}.{Gates.__qualname__}"
            given["model"]["ranks"] = _namespace(class_path=path, init_args=_namespace(**fields_of(gates)))
            return
        given["model"]["ranks"] = None
        given["trainer"].update(_namespace(min_steps=None, min_epochs=None, num_sanity_val_steps=0))
        given["trainer"]["enable_progress_bar"] = False
        self.save_config_callback = None  # a file of settings belongs to a checkpoint

    def before_fit(self) -> None:
        """Go on with gates that were interrupted."""
        if self._settings.mode == "gates":
            super().before_fit()

    def after_fit(self) -> None:
        """Write down what was found.

        Raises:
            ValueError: Nothing is left.
        """
        found = self._from_probe(self._probe) if self._probe is not None else self._from_gates()
        if not found.spent:
            raise ValueError(
                f"every gate is shut, as a price of {self._settings.price:g} is more than any site was worth; lower "
                "the price (--search.price) and start over with --resume false"
            )
        found.check(self.model.mixture)
        if self.trainer.is_global_zero:
            found.write(Path(self.trainer.default_root_dir), self.model.mixture, self._model_as_given())

    @property
    def _settings(self) -> SearchSettings:
        settings: SearchSettings = self._get(self.config_init, "search")
        return settings

    def _own_callbacks(self, root: Path) -> list[Callback]:
        if self._settings.mode == "probe":
            self._probe = ProbeSites(self._settings.batches)
            return [self._probe]
        return [ShowScores(), *self._kept_callbacks(root)]

    def _from_probe(self, probe: ProbeSites) -> FoundSites:
        costs = torch.tensor([each.cost for each in probe.probed])
        budget = budget_of(self._settings.budget, costs)
        scores = torch.stack(list(probe.scores.values())).mean(dim=0)
        by_task = {task: own.tolist() for task, own in probe.scores.items()}
        kept = highest(scores, costs, budget)
        return FoundSites("score", probe.probed, scores.tolist(), by_task, kept.tolist(), budget)

    def _from_gates(self) -> FoundSites:
        """Read the gates from the last checkpoint: a run that was at its end made no new ones."""
        stored = read_checkpoint(Path(self.trainer.default_root_dir) / LAST)
        steps = int(self.trainer.estimated_stepping_batches)
        driver = GateDriver(self.model.mixture.banks(), self._settings.gates(), steps)
        driver.load_state(stored["ranks"])
        if driver.step < steps:
            raise ValueError(
                f"the training ended after {driver.step} of {steps} steps, before gates were opened or shut; let it "
                "run to its end, with neither early stopping nor max_time"
            )
        return FoundSites("gate", driver.gated, driver.gates.tolist(), {}, driver.kept.tolist(), driver.budget)

    def _model_as_given(self) -> Mapping[str, Any]:
        """Return the model's settings as a file would have them."""
        whole: Mapping[str, Any] = yaml.safe_load(written(self._parser("fit"), self.config["fit"]))
        return whole["model"]  # type: ignore[no-any-return]


def _namespace(**values: Any) -> Namespace:
    return Namespace(**values)  # type: ignore[no-untyped-call]
