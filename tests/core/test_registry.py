"""Registries: what a name finds, what is refused, and when packages are loaded."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moadapt import registry
from moadapt.registry import BASES, DATASETS, FAMILIES, MERGES, ROUTERS, TASKS, Registry
from moadapt_routers import TopK

SHIPPED = [pytest.param(found, id=found.kind) for found in (FAMILIES, MERGES, ROUTERS, TASKS, BASES, DATASETS)]


class Hammer:
    pass


class Hammock:
    pass


@pytest.fixture
def tools() -> Registry:
    """A registry of two classes that loads nothing."""
    found = Registry("tool")
    found.register("hammer")(Hammer)
    found.register("hammock")(Hammock)
    return found


def package(folder: Path, name: str, **modules: str) -> None:
    """Write a package of these modules; its own file imports none of them."""
    (folder / name).mkdir()
    for module, text in {"__init__": "", **modules}.items():
        (folder / name / f"{module}.py").write_text(text)


def test_a_decorated_class_stays_itself_and_is_found() -> None:
    tools = Registry("tool")
    assert tools.register("hammer")(Hammer) is Hammer
    assert tools.get("hammer") is Hammer
    assert tools.name_of(Hammer) == "hammer"
    assert "hammer" in tools
    assert "saw" not in tools


def test_names_and_classes_come_in_order(tools: Registry) -> None:
    tools.register("anvil")(SimpleNamespace)
    assert tools.names() == ["anvil", "hammer", "hammock"]
    assert list(tools) == [("anvil", SimpleNamespace), ("hammer", Hammer), ("hammock", Hammock)]


def test_a_name_given_twice_is_refused_with_both_places(tools: Registry) -> None:
    with pytest.raises(ValueError, match=r"tool 'hammer' is registered twice: by .*\.Hammer and by .*\.Hammock"):
        tools.register("hammer")(Hammock)
    assert tools.get("hammer") is Hammer


def test_a_class_that_is_defined_again_takes_its_own_place(tools: Registry) -> None:
    again = type("Hammer", (), {"__module__": Hammer.__module__, "__qualname__": Hammer.__qualname__})
    tools.register("hammer")(again)
    assert tools.get("hammer") is again


def test_an_unknown_name_lists_the_nearest_and_all(tools: Registry) -> None:
    expected = r"no tool is called 'hamer'; did you mean hammer\? There are: hammer, hammock\."
    with pytest.raises(ValueError, match=expected):
        tools.get("hamer")
    with pytest.raises(ValueError, match=r"no tool is called ''; There are: hammer, hammock\."):
        tools.get("")


@pytest.mark.parametrize("ask", [Registry.names, list, lambda tools: tools.get("x"), lambda tools: "x" in tools])
def test_an_empty_registry_says_what_to_run(ask: Any) -> None:
    with pytest.raises(ValueError, match=r"no tool is registered; from a checkout run `pip install -e \.` once"):
        ask(Registry("tool"))


def test_a_dotted_path_needs_no_registration(tools: Registry) -> None:
    assert tools.get("moadapt_routers.top_k.TopK") is TopK
    assert tools.get(tools.name_of(TopK)) is TopK


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package.Tool", "cannot import 'no_such_package.Tool': No module named 'no_such_package'"),
        ("moadapt.names.Tool", "cannot import 'moadapt.names.Tool': .*has no attribute 'Tool'"),
        ("moadapt.names.check_names", "'moadapt.names.check_names' is a function, not a class"),
    ],
)
def test_a_path_to_no_class_is_refused(tools: Registry, path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tools.get(path)


def test_a_class_in_a_file_is_the_same_whenever_it_is_asked_for(
    tools: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tools_of_a_user.py"
    file.write_text("from tests.core.test_registry import Hammer\nclass Saw: pass\nclass Small(Saw): pass\n")
    saw = tools.get(f"{file}:Saw")
    assert tools.get(f"{file}:Saw") is saw
    assert issubclass(tools.get(f"{file}:Small"), saw)
    monkeypatch.chdir(tmp_path)
    assert tools.get(f"{file.name}:Saw") is saw
    assert tools.name_of(saw) == f"{file}:Saw"  # found from any folder
    assert tools.name_of(Hammer) == "hammer"  # which the file only imports


def test_a_class_in_a_file_is_stored_by_its_file_though_registered(tools: Registry, tmp_path: Path) -> None:
    """Nobody else would import the file, so the short name alone finds nothing in the next process."""
    file = tmp_path / "registering_tools.py"
    file.write_text("from tests.core.test_registry import LATER\n@LATER.register('saw')\nclass Saw: pass\n")
    found = tools.get(f"{file}:Saw")
    assert LATER.get("saw") is found
    assert LATER.name_of(found) == f"{file}:Saw"


def test_a_dataclass_in_a_file_may_postpone_annotations(tools: Registry, tmp_path: Path) -> None:
    file = tmp_path / "postponed_tools.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass(frozen=True)\nclass Saw:\n    teeth: int = 5\n"
    )
    assert tools.get(f"{file}:Saw")(7).teeth == 7


def test_files_of_one_name_and_installed_modules_keep_apart(tools: Registry, tmp_path: Path) -> None:
    text = "from dataclasses import dataclass\n@dataclass\nclass Saw:\n    teeth: 'int' = {0}\n"
    found = []
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        file = tmp_path / str(number) / "fractions.py"
        file.write_text(text.format(number))
        found.append(tools.get(f"{file}:Saw"))
    assert [saw().teeth for saw in found] == [1, 2]
    assert [vars(sys.modules[saw.__module__])["Saw"] for saw in found] == found
    assert not hasattr(importlib.import_module("fractions"), "Saw")


def test_a_file_that_fails_is_read_again(tools: Registry, tmp_path: Path) -> None:
    file = tmp_path / "failing_tools.py"
    file.write_text("raise RuntimeError('not yet')")
    before = set(sys.modules)
    with pytest.raises(RuntimeError, match="not yet"):
        tools.get(f"{file}:Saw")
    assert set(sys.modules) == before
    file.write_text("class Saw: pass")
    assert tools.get(f"{file}:Saw").__name__ == "Saw"


def test_only_what_was_imported_is_known(tools: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tools_not_imported.py"
    file.write_text("class Saw: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert tools.known("hammer") is Hammer
    assert tools.known("moadapt_routers.top_k.TopK") is TopK
    for name in (f"{file}:Saw", "tools_not_imported.Saw"):
        with pytest.raises(ValueError, match="would be the tool, but this process has not imported it"):
            tools.known(name)
        assert tools.known(tools.name_of(tools.get(name))) is tools.get(name)
    for name in ("moadapt_routers.top_k.Saw", ".Saw", ".py:Saw", "moadapt_routers.Saw"):
        with pytest.raises(ValueError, match="has not imported"):
            tools.known(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read '.*tools.py'; give the path of an existing Python file"),
        ("class Axe: pass", "defines no 'Saw'; give file.py:Class with a class of that file"),
        ("Saw = 3", "is a int, not a class; name a class"),
    ],
)
def test_a_file_without_the_class_is_refused(tools: Registry, tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "tools.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message):
        tools.get(f"{file}:Saw")


def test_packages_are_loaded_when_first_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = "from tests.core.test_registry import LATER\n@LATER.register('{0}')\nclass Found: pass\n"
    package(tmp_path, "shipped_tools", first=part.format("first"), _private="raise RuntimeError\n")
    package(tmp_path, "joined_tools", second=part.format("second"))
    monkeypatch.syspath_prepend(tmp_path)
    points = [SimpleNamespace(load=lambda: importlib.import_module("joined_tools"))]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "some.tools" else [])
    monkeypatch.setattr(LATER, "_package", "shipped_tools")
    monkeypatch.setattr(LATER, "_group", "some.tools")
    monkeypatch.setattr(LATER, "_loaded", False)
    monkeypatch.setattr(LATER, "_classes", {})
    assert "shipped_tools" not in sys.modules
    assert LATER.names() == ["first", "second"]
    points.clear()
    assert LATER.names() == ["first", "second"]


def test_a_package_that_fails_to_load_fails_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "broken_tools", first="import no_such_module_of_anyone\n")
    monkeypatch.syspath_prepend(tmp_path)
    tools = Registry("tool", package="broken_tools")
    tools.register("hammer")(Hammer)
    for _ in range(2):
        with pytest.raises(ImportError, match="no_such_module_of_anyone"):
            tools.get("hammer")


@pytest.mark.parametrize("shipped", SHIPPED)
def test_shipped_parts_are_found_by_name_and_by_path(shipped: Registry) -> None:
    assert shipped.names()
    for name, part in shipped:
        assert shipped.get(name) is part
        assert shipped.name_of(part) == name
        assert shipped.get(f"{part.__module__}.{part.__qualname__}") is part


LATER = Registry("tool")
"""What files of these tests register themselves with."""
