"""Routers of moadapt: one a file."""

from moadapt_routers.by_task import ByTask
from moadapt_routers.constant import Constant
from moadapt_routers.softmax import Softmax
from moadapt_routers.top_k import TopK

__all__ = ["ByTask", "Constant", "Softmax", "TopK"]
