"""A tiny base on disk."""

import logging
from collections.abc import Iterator

import pytest

from tests.quantised.bases import write_base


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny random Llama."""
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Leave out what bitsandbytes says of every call that it computes in 16 bits."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)
