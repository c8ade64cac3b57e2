"""Router-free merges: one method a file, each with a report of how far it is from the mixture."""

from moadapt.merging.report import MergeRefusedError, MergeReport

__all__ = ["MergeRefusedError", "MergeReport"]
