"""Every check of the table in docs/bases.md, on every twin."""

from pathlib import Path

import pytest

from tests.bases.checks import CHECKS, EXCUSES, case_of
from tests.bases.table import PAGE, table
from tests.bases.twins import NAMES

CASES = [(name, check) for name in NAMES for check in CHECKS if (name, check) not in EXCUSES]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "check"), CASES, ids=["-".join(case) for case in CASES])
def test_a_base_does_what_the_table_says(name: str, check: str) -> None:
    CHECKS[check](case_of(name))


def test_the_page_has_the_table() -> None:
    found = {(name, check): EXCUSES.get((name, check), "yes") for name in NAMES for check in CHECKS}
    assert table(found) in Path(PAGE).read_text()
