"""Metrics of the tasks: torchmetrics classes that give the same value on one process as on many."""

from moadapt_tasks.metrics.bleu import BLEU
from moadapt_tasks.metrics.caption_tokens import caption_tokens
from moadapt_tasks.metrics.cider_d import CIDErD
from moadapt_tasks.metrics.grounding_accuracy import GroundingAccuracy
from moadapt_tasks.metrics.rouge_l import ROUGEL
from moadapt_tasks.metrics.vqa_accuracy import VQAAccuracy

__all__ = ["BLEU", "ROUGEL", "CIDErD", "GroundingAccuracy", "VQAAccuracy", "caption_tokens"]
