"""Every Python block of the README and the pages runs, page by page, as a reader would run it.

Blocks of one page share their names. A block that cannot run here is preceded by the line `<!-- not run: why -->`.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from moadapt import registry
from moadapt.cli.short_names import resolve
from moadapt.task import Task

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?P<skip><!-- not run: .+ -->\n+)?^```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


def blocks(page: Path, language: str) -> list[str]:
    """Blocks to run, each moved to the line it has on its page, so that a traceback points there."""
    text = page.read_text(encoding="utf-8")
    found = [match for match in BLOCK.finditer(text) if match["language"] == language and not match["skip"]]
    return ["\n" * text.count("\n", 0, match.start("text")) + match["text"] for match in found]


def pages_with(language: str) -> list[object]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if blocks(page, language)]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """An empty module in an empty folder; the parts that it registers are forgotten afterwards."""
    module = ModuleType("docs_page")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    yield module
    for known in vars(registry).values():
        if isinstance(known, registry.Registry):
            own = [name for name, part in known._classes.items() if part.__module__ == module.__name__]
            for name in own:
                del known._classes[name]


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_of_a_page_run(page: Path, reader: ModuleType) -> None:
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), vars(reader))


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_yaml_blocks_of_a_page_parse(page: Path) -> None:
    for text in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(text), dict)


TASKS = [
    pytest.param(task, id=f"{page.stem}-{name}")
    for page in PAGES
    for text in blocks(page, "yaml")
    for name, task in (yaml.safe_load(text).get("data", {}).get("tasks") or {}).items()
]


@pytest.mark.parametrize("task", TASKS)
def test_tasks_of_a_yaml_block_are_built_as_the_command_builds_them(task: dict[str, Any]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--tasks", type=dict[str, Task])
    given = parser.parse_object(resolve({"tasks": {"task": task}}))
    built = parser.instantiate(given).tasks["task"]
    assert type(built) is registry.TASKS.get(task["class_path"])


def test_a_block_moves_to_its_line_and_a_marked_one_is_left_out(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\n<!-- not run: needs a hub -->\n```python\ny = 2\n```\n")
    assert blocks(page, "python") == ["\n\n\nx = 1\n"]
