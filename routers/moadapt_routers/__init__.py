"""Routers of moadapt: one a file."""

from moadapt_routers.abstain import Abstain
from moadapt_routers.arrow import Arrow
from moadapt_routers.by_task import ByTask
from moadapt_routers.constant import Constant
from moadapt_routers.fusion import Fusion
from moadapt_routers.hard_to_soft import HardToSoft
from moadapt_routers.lorahub import LoRAHub
from moadapt_routers.meteora import MeteoRA
from moadapt_routers.poly import Poly
from moadapt_routers.prompt_mlp import PromptMLP
from moadapt_routers.prototypes import Prototypes
from moadapt_routers.remix import ReMix
from moadapt_routers.scenario import Scenario
from moadapt_routers.softmax import Softmax
from moadapt_routers.sparsemax import Sparsemax
from moadapt_routers.spectral import Spectral
from moadapt_routers.switch import Switch
from moadapt_routers.task_embedding import TaskEmbedding
from moadapt_routers.threshold import Threshold
from moadapt_routers.top_k import TopK
from moadapt_routers.top_p import TopP
from moadapt_routers.typed import Typed

__all__ = [
    "Abstain",
    "Arrow",
    "ByTask",
    "Constant",
    "Fusion",
    "HardToSoft",
    "LoRAHub",
    "MeteoRA",
    "Poly",
    "PromptMLP",
    "Prototypes",
    "ReMix",
    "Scenario",
    "Softmax",
    "Sparsemax",
    "Spectral",
    "Switch",
    "TaskEmbedding",
    "Threshold",
    "TopK",
    "TopP",
    "Typed",
]
