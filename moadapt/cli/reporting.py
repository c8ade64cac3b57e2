"""`moadapt report`: a page about a finished run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console

from moadapt.attaching import load
from moadapt.bases import load_base
from moadapt.cli.parser_messages import tidied
from moadapt.cli.routing_examples import routing_examples
from moadapt.cli.run_folder import RunFolder
from moadapt.cli.short_names import resolve
from moadapt.registry import ROUTERS, SAMPLERS, Registry
from moadapt.reporting.run_page import write_run_report
from moadapt.training import MixedTasks

FILE = "report.html"


def report(run: str, examples: int = 2) -> None:
    """Write a page about a finished run: what its routers learned, where, and how the training went.

    Args:
        run: Folder that `moadapt fit` wrote; the page is `report.html` in it.
        examples: Rows of each task to show, coloured by expert; 0 loads neither base nor data.

    Raises:
        ValueError: The folder holds no run, or its base or its data are not there any more.
    """
    if examples < 0:
        raise ValueError(f"--examples is {examples}; give 0 or more")
    folder = RunFolder(Path(run))
    model = folder.config["model"]
    routed = bool(model.get("experts"))
    shown = _examples(folder, examples) if routed and examples and folder.mixture is not None else []
    details = {
        "title": f"moadapt report: {folder.path.resolve().name}",
        "about": _about(folder, routed),
        "scores": folder.scores,
        "record": folder.record,
        "experts": list(model.get("experts") or ()),
        "curves": folder.measures,
        "objectives": folder.objectives,
        "losses": {"mixture": folder.losses} if folder.losses else {},
        "examples": shown,
        "predictions": folder.predictions,
        "settings": _settings(folder.config),
        "command": f"moadapt report {run}",
    }
    write_run_report(details, folder.path / FILE)
    Console().print(f"The report is in {folder.path / FILE}", highlight=False)


def _examples(folder: RunFolder, each: int) -> list[dict[str, Any]]:
    """Load base, mixture and data as the run had them, and route a few rows."""
    model = folder.config["model"]
    options = {key: model[key] for key in ("dtype", "attn_implementation", "quantize") if model.get(key) is not None}
    try:
        base, _ = load_base(model["base"], **options)
    except ValueError as error:
        raise ValueError(f"{error}\n--examples 0 makes the page without base and data") from error
    base.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    assert folder.mixture is not None, "asked before"
    mixture = load(folder.mixture, base).eval()
    data = _data(folder.config["data"])
    data.prepare_data()
    data.setup("validate")
    router = mixture.spec.router
    told = bool(model.get("pass_task")) or (router is not None and router.depends_on == "task")
    return routing_examples(mixture, data, each, pass_task=told)


def _data(settings: Mapping[str, Any]) -> MixedTasks:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MixedTasks, "data")
    try:
        parsed = parser.parse_object({"data": resolve(dict(settings))})
        data: MixedTasks = parser.instantiate_classes(parsed).data
    except (ValueError, TypeError) as error:  # jsonargparse raises the second for what it cannot parse
        raise ValueError(f"the run's data cannot be made again: {tidied(str(error))}") from error
    return data


def _about(folder: RunFolder, routed: bool) -> list[str]:
    model, data = folder.config["model"], folder.config["data"]
    dataset = (data.get("dataset") or {}).get("class_path", "").rpartition(".")[2]
    tasks = ", ".join(data.get("tasks") or {}) or f"the data set {dataset}"
    experts = list(model.get("experts") or {})
    what = f"{len(experts)} experts ({', '.join(experts)})" if routed else "no experts"
    shared = "a shared adapter" if model.get("shared") else "no shared adapter"
    said = [f"A mixture on the frozen base {model['base']}: {what} and {shared}, {folder.steps} steps on {tasks}."]
    if not routed:
        return [*said, "Nothing is routed in it: every input gets the same adapter, so there is no routing to show."]
    said.append(f"Its router is {_part(model['router'], ROUTERS)}.")
    if folder.mixture is None:
        said.append("The fit has not come to its end, so no mixture is saved yet, and no inputs are shown.")
    return said


def _part(given: Mapping[str, Any], registry: Registry) -> str:
    settings = given.get("init_args") or {}
    told = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    name = registry.name_of(registry.get(given["class_path"]))
    return f"{name} ({told})" if told else name


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    model, data, trainer = config["model"], config["data"], config["trainer"]
    optimization = model.get("optimization") or {}
    found = {
        "seed": config.get("seed_everything"),
        "base": model["base"],
        "max_steps": trainer.get("max_steps"),
        "batch_size": data.get("batch_size"),
        "sampling": _part(data["sampling"], SAMPLERS) if data.get("sampling") else None,
        "learning_rate": optimization.get("learning_rate"),
        "router_learning_rate": optimization.get("router_learning_rate"),
        "objectives": ", ".join(_objective(given) for given in model.get("objectives") or ()) or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _objective(given: Mapping[str, Any]) -> str:
    name = str(given["class_path"]).rpartition(".")[2]
    return f"{name} {(given.get('init_args') or {}).get('weight', '')}".strip()
