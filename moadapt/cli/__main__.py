"""`python -m moadapt.cli`: the `moadapt` command."""

import sys

from moadapt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
