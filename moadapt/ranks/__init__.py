"""Rank allocators: which rank every adapter gets at every site, one way a file."""

from moadapt.ranks.allocator import RankAllocator, RankDriver
from moadapt.ranks.depth_schedule import DepthSchedule
from moadapt.ranks.explained_variance import ExplainedVariance
from moadapt.ranks.gates import Gates
from moadapt.ranks.importance import Importance
from moadapt.ranks.trimming import trim_ranks

__all__ = ["DepthSchedule", "ExplainedVariance", "Gates", "Importance", "RankAllocator", "RankDriver", "trim_ranks"]
