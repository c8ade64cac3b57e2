"""The page that a demonstration leaves: tables, pictures and charts in one file that needs nothing else."""

from moadapt.reporting.page import write_report

__all__ = ["write_report"]
