"""What a training asks for besides right answers: one objective a file."""

from moadapt.objectives.entropy import Entropy
from moadapt.objectives.importance import Importance
from moadapt.objectives.load_balance import LoadBalance
from moadapt.objectives.mutual_information import MutualInformation
from moadapt.objectives.objective import Objective, ParameterObjective, RoutingObjective
from moadapt.objectives.orthogonality import Orthogonality
from moadapt.objectives.overlap import Overlap, overlaps
from moadapt.objectives.prior import Prior
from moadapt.objectives.sparsity import Sparsity
from moadapt.objectives.task_cross_entropy import TaskCrossEntropy
from moadapt.objectives.total_variation import TotalVariation
from moadapt.objectives.utility_ranking import UtilityRanking
from moadapt.objectives.z_loss import ZLoss

__all__ = [
    "Entropy",
    "Importance",
    "LoadBalance",
    "MutualInformation",
    "Objective",
    "Orthogonality",
    "Overlap",
    "ParameterObjective",
    "Prior",
    "RoutingObjective",
    "Sparsity",
    "TaskCrossEntropy",
    "TotalVariation",
    "UtilityRanking",
    "ZLoss",
    "overlaps",
]
