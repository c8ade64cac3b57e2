"""Training with Lightning: one module for mixtures, one for plain peft models, one data module for both."""

from moadapt.training.bad_steps import SkipBadSteps
from moadapt.training.data import MixedTasks
from moadapt.training.delta_log import LogDeltas
from moadapt.training.gradient_log import LogGradients
from moadapt.training.keep_last import KeepLast, Stopped
from moadapt.training.kept import newest
from moadapt.training.mixture_module import MixtureModule
from moadapt.training.optimization import Optimization
from moadapt.training.peft_module import PeftModule
from moadapt.training.sharding import FSDP2Strategy
from moadapt.training.stopping import StopTasks
from moadapt.training.unfreezing import Stage
from moadapt.training.watch_peers import WatchPeers

__all__ = [
    "FSDP2Strategy",
    "KeepLast",
    "LogDeltas",
    "LogGradients",
    "MixedTasks",
    "MixtureModule",
    "Optimization",
    "PeftModule",
    "SkipBadSteps",
    "Stage",
    "StopTasks",
    "Stopped",
    "WatchPeers",
    "newest",
]
