"""Check every base and print the table of docs/bases.md.

python -m tests.bases.table            # prints it; an error that a check raises stands in its cell
python -m tests.bases.table --write    # and puts it into the page
"""

import argparse
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

from tests.bases.checks import CHECKS, EXCUSES, case_of
from tests.bases.twins import NAMES
from tests.core.zoo import ZOO

PAGE = Path(__file__).parents[2] / "docs" / "bases.md"
START, END = "<!-- table: python -m tests.bases.table --write -->\n\n", "\n<!-- end of table -->"
Cells = Mapping[tuple[str, str], str]


def run(name: str, check: str) -> str:
    """Return `yes`, why the class cannot, or the error that the check raised."""
    if (name, check) in EXCUSES:
        return EXCUSES[name, check]
    try:
        CHECKS[check](case_of(name))
    except Exception as error:  # whatever it is, the table has a cell for it
        return f"**no**: {type(error).__name__}: {str(error).splitlines()[0]}"
    return "yes"


def table(found: Cells) -> str:
    """Return the table.

    Args:
        found: What to write, by base and check.
    """
    lines = [f"| class | {' | '.join(CHECKS)} |", "|---" * (len(CHECKS) + 1) + "|"]
    for name in NAMES:
        lines.append(f"| `{ZOO[name][0]}`{_apart(name)} | {' | '.join(found[name, check] for check in CHECKS)} |")
    return "\n".join(lines)


def main() -> None:
    """Check all, print the table, and leave with 1 where a check failed."""
    parser = argparse.ArgumentParser(description="What every base does with adapters.")
    parser.add_argument("--write", action="store_true", help="put the table into docs/bases.md")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    found = {(name, check): run(name, check) for name in NAMES for check in CHECKS}
    print(table(found))
    if given.write:
        before, _, rest = PAGE.read_text().partition(START)
        PAGE.write_text(before + START + table(found) + "\n" + END + rest.partition(END)[2])
    sys.exit(any(cell.startswith("**no**") for cell in found.values()))


def _apart(name: str) -> str:
    """Say which of several twins of one class this is."""
    alike = [other for other in NAMES if ZOO[other][0] == ZOO[name][0]]
    return f" ({name})" if len(alike) > 1 else ""


if __name__ == "__main__":
    main()
