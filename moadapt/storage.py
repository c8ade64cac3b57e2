"""A mixture on disk: `mixture.json` with spec and fingerprint, `adapters.safetensors` with every tensor."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from moadapt.adapters.bank import Adapter, Bank
from moadapt.adapters.initial import filled_later
from moadapt.context import routers_of
from moadapt.fingerprint import check_base, check_fingerprint, fingerprint
from moadapt.fresh_folder import fresh_folder
from moadapt.mixture import Mixture
from moadapt.mixture_spec import MixtureSpec
from moadapt.placement import Placement
from moadapt.registry import FAMILIES, ROUTERS
from moadapt.sites import Site
from moadapt.specs import bind, fields_of, from_json, to_json

SCHEMA = 1
_SPEC, _TENSORS = "mixture.json", "adapters.safetensors"


def save(mixture: Mixture, folder: Path) -> None:
    """Write a mixture.

    Args:
        mixture: What to write.
        folder: Made, or replaced as a whole where it holds a mixture.

    Raises:
        ValueError: The folder holds something else, or adapters still wait for the data that they start from.
    """
    waiting = {name for _, bank in mixture.banks() for name in bank.waiting}
    if waiting:
        raise ValueError(
            f"{', '.join(sorted(waiting))} starts from data and has not seen any, so there is nothing of it to save; "
            "call moadapt.initialise(mixture, batches) first"
        )
    spec = mixture.spec
    with mixture.bare_base() as base:
        stored = {
            "schema": SCHEMA,
            "base": {"name": base.config.name_or_path, **fingerprint(base)},
            "shared": None if spec.shared is None else to_json(spec.shared, FAMILIES),
            "experts": [{"adapter": name, **to_json(family, FAMILIES)} for name, family in spec.experts.items()],
            "router": None if spec.router is None else to_json(spec.router, ROUTERS),
            "placement": fields_of(spec.placement),
            "frozen": list(mixture.frozen),
        }
    with fresh_folder(folder, (_SPEC, _TENSORS)) as new:
        save_file(tensors(mixture), new / _TENSORS, metadata={"format": "pt"})
        (new / _SPEC).write_text(json.dumps(stored, indent=2) + "\n")


@dataclass(frozen=True)
class Stored:
    """What a folder holds.

    Args:
        spec: What was attached.
        tensors: Of adapters and routers, by stored name.
        frozen: Names of adapters that no optimiser reaches.
    """

    spec: MixtureSpec
    tensors: Mapping[str, Tensor]
    frozen: tuple[str, ...]


def read(folder: Path, base: PreTrainedModel) -> Stored:
    """Read a folder and check that it belongs to a base.

    Args:
        folder: What `save` wrote.
        base: The same base.

    Raises:
        ValueError: The folder is no mixture, its schema is unknown, or the base is another one.
    """
    stored = _read_spec(folder)
    check_base(folder / _SPEC, stored["base"], base)
    try:
        found = load_file(folder / _TENSORS, device=str(base.device))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / _TENSORS} cannot be read: {error}") from error
    with _telling(folder):
        return Stored(_spec_of(stored), found, tuple(stored.get("frozen", ())))


def is_mixture(folder: Path) -> bool:
    """Tell whether a folder is there and says that it is a mixture.

    Args:
        folder: Any path.
    """
    return (folder / _SPEC).is_file()


def base_name(folder: Path) -> str:
    """Return the name that the base of a saved mixture had.

    Args:
        folder: What `save` wrote.

    Raises:
        ValueError: The folder is no mixture, or its base had no name.
    """
    name = _read_spec(folder)["base"].get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{folder / _SPEC} does not name its base; say which it is")
    return name


def load(folder: Path, base: PreTrainedModel) -> Mixture:
    """Read a mixture onto its base.

    Args:
        folder: What `save` wrote.
        base: The same base.

    Raises:
        ValueError: The folder is no mixture, its schema is unknown, the base is another one, or tensors are missing,
            too many or of another shape.
    """
    stored = read(folder, base)
    with _telling(folder), filled_later():
        mixture = Mixture(base, stored.spec)
    try:
        fill(mixture, stored.tensors)
    except ValueError as error:
        mixture.detach()
        raise ValueError(f"{folder / _TENSORS}: {error}") from error
    try:
        for name in stored.frozen:
            mixture.freeze(name)
    except (TypeError, ValueError) as error:
        mixture.detach()
        raise ValueError(f"{folder / _SPEC}: {error}") from error
    return mixture


def copy_adapters(mixture: Mixture, folder: Path) -> None:
    """Copy a saved mixture's adapters into those of the same names and sites; routers stay as they are.

    Args:
        mixture: On the same base.
        folder: What `save` wrote.

    Raises:
        ValueError: The folder is no mixture of this base, or lacks an adapter, or one has other settings or another
            shape.
    """
    with mixture.bare_base() as base:
        stored = read(folder, base)
    _check_settings(folder, stored.spec, mixture.spec.adapters())
    for site, bank in mixture.banks():
        for name in bank.names:
            try:
                bank.load_state(name, _below(f"adapters/{name}/{site.path}/", stored.tensors))
            except ValueError as error:
                raise ValueError(f"{folder / _TENSORS}: {error}") from error


@contextmanager
def _telling(folder: Path) -> Iterator[None]:
    """Name the file where what it describes cannot be built."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / _SPEC} describes no mixture of this base: {error!r}") from error


def fill(mixture: Mixture, found: Mapping[str, Tensor]) -> None:
    """Copy tensors into a fresh mixture, which takes their number types.

    Raises:
        ValueError: Names or shapes differ; the first ones are listed.
    """
    _take_number_types(mixture, found)
    load_tensors(mixture, found)


def tensors(mixture: Mixture) -> dict[str, Tensor]:
    """Return every tensor of adapters and routers under its stored name.

    Args:
        mixture: Whose tensors.
    """
    found = {
        f"adapters/{name}/{site.path}/{part}": tensor
        for site, bank in mixture.banks()
        for name in bank.names
        for part, tensor in bank.state(name).items()
    }
    for place, router in zip(mixture.places, mixture.routers, strict=True):
        found |= {f"routers/{place.name}/{part}": t.detach() for part, t in router.state_dict().items()}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def load_tensors(mixture: Mixture, found: Mapping[str, Tensor]) -> None:
    """Copy stored tensors into a mixture; nothing is copied unless all names and shapes agree.

    Raises:
        ValueError: Names or shapes differ, and the first ones are listed; or adapters differ in what they share.
    """
    for place, fitted in zip(mixture.places, routers_of(mixture.routers), strict=True):
        fitted.make_room(_below(f"routers/{place.name}/", found))
    expected = tensors(mixture)
    wrong = sorted(expected.keys() ^ found.keys())
    wrong += sorted(n for n in expected.keys() & found.keys() if expected[n].shape != found[n].shape)
    if wrong:
        raise ValueError(f"{len(wrong)} tensors are missing, unknown or of another shape, such as {wrong[:3]}")
    for site, bank in mixture.banks():
        _check_common(site, bank, found)
    for site, bank in mixture.banks():
        for name in bank.names:
            bank.load_state(name, _below(f"adapters/{name}/{site.path}/", found))
    for place, router in zip(mixture.places, mixture.routers, strict=True):
        router.load_state_dict(_below(f"routers/{place.name}/", found))


def _check_common(site: Site, bank: Bank, found: Mapping[str, Tensor]) -> None:
    """Refuse adapters of one bank that differ in a tensor which they have in common."""
    for part in bank.common:
        keys = [f"adapters/{name}/{site.path}/{part}" for name in bank.names]
        differ = [key for key in keys if not torch.allclose(found[key], found[keys[0]], rtol=0, atol=0, equal_nan=True)]
        if differ:
            raise ValueError(f"{differ[0]} and {keys[0]} differ, but adapters of one site have {part} in common")


class StoredMixture:
    """A folder that `save` wrote, from which tensors are read when they are asked for.

    Args:
        folder: The folder.

    Raises:
        ValueError: It is no mixture, or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._stored = folder, _read_spec(folder)
        with _telling(folder):
            self.spec = _spec_of(self._stored)
        self._sites: dict[str, list[str]] = {}
        with self._tensors() as file:
            self._routers = [key for key in file.keys() if key.startswith("routers/")]  # noqa: SIM118, no mapping
            for key in file.keys():  # noqa: SIM118
                self._sites.setdefault(key.rpartition("/")[0].partition("/")[2].partition("/")[2], []).append(key)

    def check_base(self, own: Mapping[str, str]) -> None:
        """Refuse another base than the one that it was trained on.

        Args:
            own: Its fingerprint; parts that are not there are not compared.
        """
        check_fingerprint(self._folder / _SPEC, self._stored["base"], own)

    def fill_bank(self, site: Site, bank: Bank) -> None:
        """Copy the adapters of one site in.

        Args:
            site: Where.
            bank: A fresh one of that site.

        Raises:
            ValueError: A tensor is missing, too much, or of another shape.
        """
        with self._tensors() as file:
            found = {key: file.get_tensor(key) for key in self._sites.get(site.path, ())}
        _fill_bank(site, bank, found)

    def fill_routers(self, mixture: Mixture) -> None:
        """Build the routers of a mixture anew, on the CPU, and copy what was saved in.

        Args:
            mixture: That of this folder, whose base may lie on the meta device.
        """
        with self._tensors() as file:
            found = {key: file.get_tensor(key) for key in self._routers}
        router = mixture.spec.router
        for index, place in enumerate(mixture.places):
            assert router is not None, "there are places"
            own, built = _below(f"routers/{place.name}/", found), router.build(place.dim, len(mixture.experts))
            built.make_room(own)
            built.load_state_dict(own)
            mixture.routers[index] = built.to(_finest(own.values()))

    @contextmanager
    def _tensors(self) -> Iterator[Any]:
        try:
            with safe_open(self._folder / _TENSORS, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self._folder / _TENSORS} cannot be read: {error}") from error


def _fill_bank(site: Site, bank: Bank, found: Mapping[str, Tensor]) -> None:
    """Copy the adapters of one bank in, which takes the number types that were stored, as others would round."""
    own = {name: _below(f"adapters/{name}/{site.path}/", found) for name in bank.names}
    finest = _finest([tensor for tensors in own.values() for tensor in tensors.values()])
    for parameter in bank.parameters():
        parameter.data = parameter.data.to(finest)
    for name, tensors in own.items():
        bank.load_state(name, tensors)


def _take_number_types(mixture: Mixture, found: Mapping[str, Tensor]) -> None:
    """Give adapters and routers the number types that were stored, as copying into others would round."""
    for site, bank in mixture.banks():
        stored = [t for name in bank.names for t in _below(f"adapters/{name}/{site.path}/", found).values()]
        for parameter in bank.parameters():
            parameter.data = parameter.data.to(_finest(stored))
    for place, router in zip(mixture.places, mixture.routers, strict=True):
        router.to(_finest(_below(f"routers/{place.name}/", found).values()))


def _below(prefix: str, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}


def _finest(found: Iterable[Tensor]) -> torch.dtype | None:
    """The coarsest number type that holds all of these exactly; None without any."""
    types = [tensor.dtype for tensor in found if tensor.is_floating_point()]
    return reduce(torch.promote_types, types) if types else None


def _read_spec(folder: Path) -> dict[str, Any]:
    file = folder / _SPEC
    try:
        stored = json.loads(file.read_text())
    except (OSError, ValueError) as error:  # no JSON, or not even text
        raise ValueError(f"{folder} holds no readable {_SPEC}: {error}; give a folder that save() wrote") from error
    keys = {"schema", "base", "shared", "experts", "router", "placement"}
    if not isinstance(stored, dict) or stored.get("schema") != SCHEMA or keys - set(stored):
        schema = stored.get("schema") if isinstance(stored, dict) else None
        raise ValueError(
            f"{file} has schema {schema!r}; this version reads schema {SCHEMA} with {', '.join(sorted(keys))}"
        )
    return stored


def _spec_of(stored: Mapping[str, Any]) -> MixtureSpec:
    experts = [dict(entry) for entry in stored["experts"]]
    return MixtureSpec(
        experts={entry.pop("adapter"): from_json(entry, FAMILIES) for entry in experts},
        shared=None if stored["shared"] is None else from_json(stored["shared"], FAMILIES),
        router=None if stored["router"] is None else from_json(stored["router"], ROUTERS),
        placement=bind(Placement, stored["placement"]),
    )


def _check_settings(folder: Path, stored: MixtureSpec, adapters: Iterable[Adapter]) -> None:
    """Refuse adapters that are not there, or not with these settings: another scale would be another function."""
    kept = {adapter.name: adapter.spec for adapter in stored.adapters()}
    for adapter in adapters:
        if adapter.name not in kept:
            raise ValueError(f"{folder / _SPEC} has no adapter {adapter.name!r}; it has {', '.join(kept)}")
        old, new = (to_json(spec, FAMILIES) for spec in (kept[adapter.name], adapter.spec))
        differ = [name for name in {**old, **new} if name != "placement" and old.get(name) != new.get(name)]
        if differ:
            raise ValueError(
                f"{folder / _SPEC} has adapter {adapter.name!r} with other settings than it is given: "
                f"{', '.join(differ)}; give it those that it was saved with"
            )
