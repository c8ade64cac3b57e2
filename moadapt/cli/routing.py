"""`moadapt route`: trained adapters behind a router that is fitted to them, and how well it finds the right ones."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from moadapt.attaching import load
from moadapt.bases import load_base
from moadapt.cli.spelled import part_of, spelled
from moadapt.cli.trainer import load_config
from moadapt.composing import compose, reroute
from moadapt.fitting import fit_router
from moadapt.mixture import Mixture
from moadapt.registry import DATASETS, ROUTERS
from moadapt.router import RouterSpec
from moadapt.routing_regret import TaskRegret, routing_regret
from moadapt.storage import base_name
from moadapt.training import MixedTasks
from moadapt.training.batch import Batch


def route(
    mixture: str,
    data: str | None = None,
    router: str | None = None,
    fit: bool = False,
    base: str | None = None,
    out: str | None = None,
    batches: int = 4,
    batch_size: int = 32,
    seed: int = 0,
    quantize: str | None = None,
) -> None:
    """Put trained adapters behind a router, fit it to training rows, and judge it by validation rows.

    Args:
        mixture: Folder of a saved mixture; or '{vqa: FOLDER, captioning: FOLDER}', adapters that were trained apart.
        data: A file that `moadapt fit -c` takes, whose data count; or a data set, by short name or by its fields.
        router: Short name of another router, or its fields: '{name: prototypes, k: 1}'. By default the mixture's own.
        fit: Fit the router, from the adapters or from training rows, whichever it takes.
        base: A registered short name, a folder or a hub name; by default the one that the mixture names.
        out: Folder for the routed mixture.
        batches: How many batches to fit on, and how many to judge by; 0 judges by all.
        batch_size: Rows of a batch.
        seed: Of the order of training rows.
        quantize: How the base was quantised when the mixture was trained: `int8`, `int4`, `nf4` or `llm_int8`.

    Raises:
        ValueError: Something is missing or unknown, or the router needs what is not there.
    """
    if data is None:
        raise ValueError("route needs rows to judge by; give --data, such as digit_scenes or configs/demo.yaml")
    if batches < 0 or (fit and not batches):
        raise ValueError(f"batches is {batches}; give at least {1 if fit else 0}")
    chosen: RouterSpec | None = None if router is None else part_of(router, ROUTERS)
    folders = spelled(mixture) if mixture.startswith("{") else mixture
    name = base or base_name(Path(next(iter(folders.values())) if isinstance(folders, dict) else folders))
    rows = data_module(data, name, batch_size, seed)
    model: Any = load_base(name, quantize=quantize)[0]
    routed = _mixture(folders, model.to("cuda" if torch.cuda.is_available() else "cpu"), chosen)
    rows.prepare_data()
    rows.setup("fit")
    if fit:
        fit_router(routed, list(as_given(islice(rows.first_batches(batches), batches), routed)))
    held_out = islice(rows.answered("validation"), batches or None)
    Console().print(_told(routed, routing_regret(routed, as_given(held_out, routed))))
    if out is not None:
        routed.save(out)


def _mixture(folders: Any, base: Any, router: RouterSpec | None) -> Mixture:
    if not isinstance(folders, dict):
        mixture = load(folders, base)
        return mixture if router is None else reroute(mixture, router)
    if router is None:
        raise ValueError("adapters that were trained apart have no router yet; give --router, such as prototypes")
    return compose(base, folders, router=router)


def data_module(given: str, base: str, batch_size: int, seed: int) -> MixedTasks:
    """Return the rows that an option names.

    Args:
        given: A file that `moadapt fit -c` takes, or a data set, by short name or by its fields.
        base: Whose processor writes the rows.
        batch_size: Rows of a batch.
        seed: Of the order of training rows.

    Raises:
        ValueError: The file has no data.
    """
    if not Path(given).is_file():
        return MixedTasks(base, dataset=part_of(given, DATASETS), batch_size=batch_size, seed=seed)
    config = load_config(Path(given).read_text())
    if not isinstance(config, dict) or not isinstance(config.get("data"), dict):
        raise ValueError(f"{given} has no section `data`; give a file that `moadapt fit -c` takes")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MixedTasks, "data")
    settings = {**config["data"], "base": base, "batch_size": batch_size, "seed": seed}
    made: MixedTasks = parser.instantiate(parser.parse_object({"data": settings})).data
    return made


def as_given(batches: Iterable[Batch], mixture: Mixture) -> Iterator[dict[str, Any]]:
    """Give batches as a mixture takes them.

    Args:
        batches: Of a data module.
        mixture: That takes them.
    """
    for batch in batches:
        own = batch.to(mixture.base.device).cast(mixture.base.dtype)
        yield {**own.inputs, "labels": own.labels, "task": own.task_names}


def _told(mixture: Mixture, found: Iterable[TaskRegret]) -> Table:
    table = Table(title=f"{type(mixture.spec.router).__name__} on validation rows", title_justify="left")
    table.add_column("task and expert")
    for column in ("rows", "agreement", "oracle loss", "predicted", "worst", "regret"):
        table.add_column(column, justify="right")
    for each in found:
        losses = [f"{loss:.3f}" for loss in (each.oracle, each.predicted, each.worst, each.regret)]
        table.add_row(each.task, str(each.rows), f"{each.agreement:.1%}", *losses)
    return table
