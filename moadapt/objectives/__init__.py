"""What a training asks for besides right answers: one objective a file."""

from moadapt.objectives.objective import Objective
from moadapt.objectives.orthogonality import Orthogonality
from moadapt.objectives.overlap import Overlap, overlaps

__all__ = ["Objective", "Orthogonality", "Overlap", "overlaps"]
