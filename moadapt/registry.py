"""Names for parts: one decorator beside the class, found through entry points.

A registry loads its packages the first time it is asked for something, so importing `moadapt` stays cheap and third
parties join by declaring an entry point in the same group.
"""

import difflib
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type[Any])
_FILES: dict[Path, ModuleType] = {}
"""Files that were read for `file.py:Class`."""


class Registry:
    """A table of part classes under short names.

    Args:
        kind: What the parts are called in messages, in the singular.
        group: Entry-point group whose packages hold the parts.
        package: A package of this library that holds parts, loaded beside the group's.
    """

    def __init__(self, kind: str, *, group: str | None = None, package: str | None = None) -> None:
        self.kind = kind
        self._group = group
        self._package = package
        self._classes: dict[str, type[Any]] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[Class], Class]:
        """Give a class its short name.

        Args:
            name: Lower-case words joined by underscores.

        Raises:
            ValueError: Another class has the name; both places are named.
        """

        def add(part: Class) -> Class:
            taken = self._classes.get(name)
            if taken is not None and _place(taken) != _place(part):
                raise ValueError(
                    f"{self.kind} {name!r} is registered twice: by {_place(taken)} and by {_place(part)}; "
                    "give one of them another name"
                )
            self._classes[name] = part
            return part

        return add

    def get(self, name: str) -> type[Any]:
        """Look a class up by short name, dotted path or `file.py:Class`, importing or reading where needed.

        Raises:
            ValueError: Nothing has that name; the nearest names are listed.
        """
        if ".py:" in name:
            return _from_file(name)
        if "." in name:
            return _from_path(name)
        classes = self._all()
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=3)
            hint = f"did you mean {', '.join(near)}? " if near else ""
            raise ValueError(
                f"no {self.kind} is called {name!r}; {hint}There are: {', '.join(sorted(classes))}. "
                "A dotted path or file.py:Class works without registration"
            )
        return classes[name]

    def known(self, name: str) -> type[Any]:
        """Look a class up as `get` does, but run no code for it, so that the name may come from anybody.

        Raises:
            ValueError: Nothing has that name, or this process has not imported or read its module yet.
        """
        if "." not in name:
            return self.get(name)
        file, _, attribute = name.rpartition(":" if ".py:" in name else ".")
        module = _FILES.get(Path(file).resolve()) if ".py:" in name else sys.modules.get(file)
        if module is None or attribute not in vars(module):
            raise ValueError(
                f"{name!r} would be the {self.kind}, but this process has not imported it, and a stored name alone "
                "runs no code; if you trust it, import its module first, or, for a file, call get() with that name on "
                "FAMILIES or ROUTERS of moadapt.registry"
            )
        return _as_class(name, vars(module)[attribute])

    def name_of(self, part: type[Any]) -> str:
        """Return what finds a class again: `file.py:Class` if it was read so, else its short name or dotted path."""
        for file, module in _FILES.items():
            if part.__module__ == module.__name__ and vars(module).get(part.__qualname__) is part:
                return f"{file}:{part.__qualname__}"
        for name, known in self._all().items():
            if known is part:
                return name
        return _place(part)

    def names(self) -> list[str]:
        """Return all short names, sorted."""
        return sorted(self._all())

    def __iter__(self) -> Iterator[tuple[str, type[Any]]]:
        """Iterate over (short name, class) in name order."""
        return iter(sorted(self._all().items()))

    def __contains__(self, name: str) -> bool:
        """Tell whether a short name is taken."""
        return name in self._all()

    def _all(self) -> dict[str, type[Any]]:
        if not self._loaded:
            self._load()
        if not self._classes:
            raise ValueError(f"no {self.kind} is registered; from a checkout run `pip install -e .` once")
        return self._classes

    def _load(self) -> None:
        if self._package is not None:
            _import_all(importlib.import_module(self._package))
        if self._group is not None:
            for point in entry_points(group=self._group):
                _import_all(point.load())
        self._loaded = True


def name_files(text: str) -> str:
    """Return a text with `file.py:Class` in the place of the dotted paths of classes that were read so."""
    for file, module in _FILES.items():
        text = text.replace(f"{module.__name__}.", f"{file}:")
    return text


def _import_all(package: object) -> None:
    """Import every module of a package, so that its decorators run."""
    if not isinstance(package, ModuleType) or not hasattr(package, "__path__"):
        return
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.rsplit(".", 1)[-1].startswith("_"):
            importlib.import_module(module.name)


def _place(part: type[Any]) -> str:
    return f"{part.__module__}.{part.__qualname__}"


def _from_path(path: str) -> type[Any]:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import {path!r}: {error}; give package.module.Class") from error
    return _as_class(path, found)


def _from_file(place: str) -> type[Any]:
    file, _, name = place.rpartition(":")
    path = Path(file).resolve()
    if path not in _FILES:  # once, so that a class is the same whenever it is asked for
        _FILES[path] = _read(path)
    if not hasattr(_FILES[path], name):
        raise ValueError(f"{file!r} defines no {name!r}; give file.py:Class with a class of that file")
    return _as_class(place, getattr(_FILES[path], name))


def _read(file: Path) -> ModuleType:
    # a name that no import statement finds, and no two files share
    name = f"moadapt_file_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ValueError(f"cannot read '{file}'; give the path of an existing Python file as file.py:Class")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _as_class(place: str, found: object) -> type[Any]:
    if not isinstance(found, type):
        raise ValueError(f"{place!r} is a {type(found).__name__}, not a class; name a class")
    return found


BALANCES = Registry("balance method", package="moadapt.balancing", group="moadapt.balancing")
FAMILIES = Registry("adapter family", package="moadapt.adapters", group="moadapt.adapters")
INITIALS = Registry("initial state", package="moadapt.adapters.initial", group="moadapt.initial")
MERGES = Registry("merge method", package="moadapt.merging", group="moadapt.merging")
OBJECTIVES = Registry("objective", package="moadapt.objectives", group="moadapt.objectives")
RANKS = Registry("rank allocator", package="moadapt.ranks", group="moadapt.ranks")
ROUTERS = Registry("router", group="moadapt.routers")
SAMPLERS = Registry("sampler", package="moadapt.sampling", group="moadapt.sampling")
TASKS = Registry("task", group="moadapt.tasks")
BASES = Registry("base", group="moadapt.tasks")
DATASETS = Registry("data set", group="moadapt.tasks")
TEXT_METRICS = Registry("text metric", group="moadapt.tasks")
"""Classes whose objects take predicted texts, and for each row a list of right ones."""
CODECS = Registry("box codec", group="moadapt.tasks")
VIEWS = Registry("view", group="moadapt.tasks")
