"""What the tests of training need: a tiny base, and Lightning's harmless notices silenced."""

from pathlib import Path

import pytest

from tests.training.conftest import _NOTICES, base

__all__ = ["base"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for notice in _NOTICES:
                item.add_marker(pytest.mark.filterwarnings(notice))
