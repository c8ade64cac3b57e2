"""What a search found: which LoRAs are kept at which sites, as files that a fit takes and people read."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.table import Table

from moadapt.mixture import Mixture
from moadapt.mixture_spec import MixtureSpec
from moadapt.names import SHARED
from moadapt.ranks.allocator import ranks_of, with_ranks
from moadapt.ranks.gates import Gated
from moadapt.reporting.ranks import save_rank_picture


@dataclass(frozen=True)
class FoundSites:
    """Every LoRA at every site of its placement, what it is worth, and whether it is kept.

    Args:
        measure: What the values are.
        candidates: The LoRAs, N, site by site.
        values: One each, N.
        by_task: Such values by task, where there are any, N each.
        kept: Whether each is kept, N.
        budget: How many parameters might be kept.
    """

    measure: Literal["gate", "score"]
    candidates: Sequence[Gated]
    values: Sequence[float]
    by_task: Mapping[str, Sequence[float]]
    kept: Sequence[bool]
    budget: int

    @property
    def spent(self) -> int:
        """How many parameters are kept."""
        return sum(each.cost for each, kept in zip(self.candidates, self.kept, strict=True) if kept)

    def check(self, mixture: Mixture) -> None:
        """Refuse what no fit would take.

        Args:
            mixture: That was searched.

        Raises:
            ValueError: No expert is left anywhere.
        """
        try:
            self.spec(mixture).sites(mixture.anatomy)
        except ValueError as error:
            raise ValueError(
                f"with {self.spent:,} of {self.budget:,} parameters, {error}; or give a larger --search.budget"
            ) from error

    def spec(self, mixture: Mixture) -> MixtureSpec:
        """Return the mixture's spec with rank 0 wherever a LoRA is not kept.

        Args:
            mixture: That was searched.
        """
        ranks = {
            name: {site.path: rank for site, rank in own.items()}
            for name, own in ranks_of(mixture.spec, mixture.anatomy).items()
        }
        for each, kept in zip(self.candidates, self.kept, strict=True):
            if not kept:
                ranks[each.adapter][each.site.path] = 0
        return with_ranks(mixture.spec, ranks)

    def write(self, folder: Path, mixture: Mixture, model: Mapping[str, Any]) -> None:
        """Write `placement.json`, `placement.yaml` and `ranks.png`, and show a table.

        Args:
            folder: Made if need be.
            mixture: That was searched.
            model: Its settings as in a file, which the snippet repeats but for the ranks.
        """
        folder.mkdir(parents=True, exist_ok=True)
        spec = self.spec(mixture)
        snippet = yaml.safe_dump({"model": _with_ranks(model, spec)}, sort_keys=False)
        head = "# Takes the place of adapters in a file before it: moadapt fit -c FILE -c placement.yaml\n"
        _put(folder / "placement.json", lambda file: file.write_text(json.dumps(self.as_json(), indent=2) + "\n"))
        _put(folder / "placement.yaml", lambda file: file.write_text(head + snippet))
        _put(folder / "ranks.png", lambda file: save_rank_picture(spec, mixture.anatomy, file))
        console = Console()
        console.print(self._table())
        told = f"To train what is kept: moadapt fit -c FILE -c {folder / 'placement.yaml'}"
        console.print(told, highlight=False, soft_wrap=True)

    def as_json(self) -> dict[str, Any]:
        """Return everything, by adapter and site."""
        adapters: dict[str, dict[str, Any]] = {}
        for index, each in enumerate(self.candidates):
            found: dict[str, Any] = {self.measure: self.values[index]}
            if self.by_task:
                found["tasks"] = {task: values[index] for task, values in self.by_task.items()}
            found |= {"parameters": each.cost, "kept": self.kept[index]}
            adapters.setdefault(each.adapter, {})[each.site.path] = found
        every = sum(each.cost for each in self.candidates)
        return {"budget": self.budget, "spent": self.spent, "parameters": every, "adapters": adapters}

    def _table(self) -> Table:
        """Return sites and parameters kept, by adapter and tower."""
        title = f"kept {self.spent:,} parameters of a budget of {self.budget:,}"
        table = Table(title=title, title_justify="left")
        for column in ("adapter", "tower"):
            table.add_column(column)
        for column in ("sites kept", "parameters kept", f"highest {self.measure}"):
            table.add_column(column, justify="right")
        rows: dict[tuple[str, str], list[int]] = {}
        for index, each in enumerate(self.candidates):
            rows.setdefault((each.adapter, each.site.tower), []).append(index)
        for (adapter, tower), indices in sorted(rows.items(), key=lambda row: (row[0][0] != SHARED, row[0][0])):
            costs = [self.candidates[index].cost for index in indices]
            kept = [self.kept[index] for index in indices]
            spent = sum(cost for cost, own in zip(costs, kept, strict=True) if own)
            best = max(self.values[index] for index in indices)
            table.add_row(adapter, tower, f"{sum(kept)} of {len(kept)}", f"{spent:,} of {sum(costs):,}", f"{best:.3g}")
        return table


def _with_ranks(model: Mapping[str, Any], spec: MixtureSpec) -> dict[str, Any]:
    """Return the settings of all adapters with the ranks of a spec, whole, as a later file replaces what it names."""
    ranks = {adapter.name: getattr(adapter.spec, "ranks", None) for adapter in spec.adapters()}

    def changed(name: str, part: Mapping[str, Any]) -> dict[str, Any]:
        own = {"ranks": ranks[name]} if ranks[name] else {}
        return {**part, "init_args": {**part.get("init_args", {}), **own}}

    shared = {} if spec.shared is None else {"shared": changed(SHARED, model["shared"])}
    experts = {name: changed(name, part) for name, part in (model["experts"] or {}).items()}
    return {**shared, **({"experts": experts} if experts else {}), "ranks": None}


def _put(file: Path, write: Callable[[Path], Any]) -> None:
    """Write beside a file, then give it its name."""
    fresh = file.with_name(f".{file.name}")
    write(fresh)
    fresh.replace(file)
