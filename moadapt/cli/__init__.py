"""The `moadapt` command."""

from moadapt.cli.main import main

__all__ = ["main"]
