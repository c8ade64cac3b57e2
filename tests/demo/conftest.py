"""Lightning's notices about what the demonstration does on purpose."""

import pytest

_NOTICES = (
    "ignore:Found .* eval mode",
    "ignore:Couldn't infer the batch indices",
    "ignore:The number of training batches",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests of this folder pass over them."""
    for item in items:
        if "/demo/" in str(item.path):
            for notice in _NOTICES:
                item.add_marker(pytest.mark.filterwarnings(notice))
