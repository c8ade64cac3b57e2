"""What a training asks for besides right answers: one objective a file."""

from moadapt.objectives.load_balance import LoadBalance
from moadapt.objectives.objective import Objective, ParameterObjective, RoutingObjective
from moadapt.objectives.orthogonality import Orthogonality
from moadapt.objectives.overlap import Overlap, overlaps
from moadapt.objectives.task_cross_entropy import TaskCrossEntropy

__all__ = [
    "LoadBalance",
    "Objective",
    "Orthogonality",
    "Overlap",
    "ParameterObjective",
    "RoutingObjective",
    "TaskCrossEntropy",
    "overlaps",
]
