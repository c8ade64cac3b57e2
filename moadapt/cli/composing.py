"""`moadapt compose`: adapters that others trained, behind one router, as a mixture."""

from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console

from moadapt.bases import load_base
from moadapt.cli.doctor import base_of
from moadapt.cli.spelled import part_of, spelled
from moadapt.composing import compose as compose_adapters
from moadapt.registry import ROUTERS
from moadapt.storage import base_name, is_mixture


def compose(
    adapters: str,
    router: str | None = None,
    out: str | None = None,
    base: str | None = None,
    shared: str | None = None,
    frozen: bool = False,
    dropout: float | None = None,
    initial: str | None = None,
    quantize: str | None = None,
) -> None:
    """Put adapters behind a router and save them as a mixture, whose router is then trained or fitted.

    Args:
        adapters: By name: '{vqa: FOLDER, captioning: owner/name}', folders of the peft library's LoRAs, their hub
            names, or folders of mixtures.
        router: Short name of a router, or its fields: '{name: top_k, k: 2}'.
        out: Folder for the mixture.
        base: A registered short name, a folder or a hub name; by default the one that the first adapter names.
        shared: The adapter that every input uses, as one of the others.
        frozen: Whether no training shall reach the adapters.
        dropout: Of all adapters; those of one site must agree.
        initial: Of adapters that were taken off their base before training, how they were then, by name.
        quantize: How to quantise the base: `int8`, `int4`, `nf4` or `llm_int8`.

    Raises:
        ValueError: An adapter is refused, or something is unknown.
    """
    if router is None or out is None:
        raise ValueError("give the router with --router, such as top_k, and the folder to write with --out")
    named = _mapping("the adapters", adapters)
    before = {} if initial is None else _mapping("--initial", initial)
    chosen = part_of(router, ROUTERS)
    model = load_base(base or _base(next(iter(named.values()))), quantize=quantize)[0]
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    mixture = compose_adapters(
        model, named, router=chosen, shared=shared, frozen=frozen, dropout=dropout, initial=before
    )
    mixture.save(out)
    sites = len(mixture.sites)
    Console().print(f"{', '.join(mixture.experts)} at {sites} sites behind {type(chosen).__name__}: {out}")
    if chosen.fits_from:
        Console().print(f"its router is yet to be fitted: moadapt route {out} --fit --data FILE --out FOLDER")


def _mapping(what: str, given: str) -> dict[str, str]:
    found = spelled(given)
    if not isinstance(found, Mapping) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"{what} are {given!r}; give them by name, such as '{{vqa: FOLDER, captioning: FOLDER}}'")
    return {str(name): value for name, value in found.items()}


def _base(reference: str) -> str:
    folder = Path(reference)
    if not folder.exists() and is_mixture(Path(reference.rpartition(":")[0])):
        folder = Path(reference.rpartition(":")[0])
    return base_name(folder) if is_mixture(folder) else base_of(reference)
