"""What routers do, in numbers: one torchmetrics object a file, for one place, over all processes.

All read `Routed`, the inputs that a place routed, and judge the weights that inputs got, whatever logits made them.
"""

from moadapt.measures.dead_experts import DeadExperts
from moadapt.measures.drift import Drift, row_shares
from moadapt.measures.dropped_tokens import DroppedTokens
from moadapt.measures.effective_experts import EffectiveExperts
from moadapt.measures.input_information import InputInformation
from moadapt.measures.load import Load
from moadapt.measures.modality_load import ModalityLoad
from moadapt.measures.routing_entropy import RoutingEntropy
from moadapt.measures.task_information import TaskInformation
from moadapt.measures.task_load import TaskLoad

__all__ = [
    "DeadExperts",
    "Drift",
    "DroppedTokens",
    "EffectiveExperts",
    "InputInformation",
    "Load",
    "ModalityLoad",
    "RoutingEntropy",
    "TaskInformation",
    "TaskLoad",
    "row_shares",
]
