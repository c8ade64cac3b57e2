"""A folder to write tiny data sets in."""

from pathlib import Path

import pytest

from tests.tasks.spoiled_folder import Folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)
