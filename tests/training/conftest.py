"""A tiny base for the whole session, and Lightning's harmless notices silenced."""

from pathlib import Path

import pytest

from tests.training import toy

_NOTICES = (
    "ignore:Found .* eval mode",
    "ignore:.*LeafSpec.*is deprecated",
    "ignore:`is_gradient_checkpointing` is deprecated",
    "ignore:The number of training batches",
    "ignore:The '.*' does not have many workers",
    "ignore:It is recommended to use `self.log",
    "ignore:Couldn't infer the batch indices",
    "ignore:.*fork.*:DeprecationWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for notice in _NOTICES:
                item.add_marker(pytest.mark.filterwarnings(notice))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny random LLaVA."""
    return toy.write_base(tmp_path_factory.mktemp("base"))
