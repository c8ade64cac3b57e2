"""Metrics of the tasks: torchmetrics classes that give the same value on one process as on many."""

from moadapt_tasks.metrics.anls import ANLS
from moadapt_tasks.metrics.bleu import BLEU
from moadapt_tasks.metrics.box_set_accuracy import BoxSetAccuracy
from moadapt_tasks.metrics.caption_tokens import caption_tokens
from moadapt_tasks.metrics.choice_accuracy import ChoiceAccuracy
from moadapt_tasks.metrics.cider_d import CIDErD
from moadapt_tasks.metrics.exact_match import ExactMatch
from moadapt_tasks.metrics.gqa_scores import GQAScores
from moadapt_tasks.metrics.grounding_accuracy import GroundingAccuracy
from moadapt_tasks.metrics.meteor import METEOR
from moadapt_tasks.metrics.nlvr2_scores import NLVR2Scores
from moadapt_tasks.metrics.rouge_l import ROUGEL
from moadapt_tasks.metrics.spice import SPICE
from moadapt_tasks.metrics.vqa_accuracy import VQAAccuracy

__all__ = [
    "ANLS",
    "BLEU",
    "METEOR",
    "ROUGEL",
    "SPICE",
    "BoxSetAccuracy",
    "CIDErD",
    "ChoiceAccuracy",
    "ExactMatch",
    "GQAScores",
    "GroundingAccuracy",
    "NLVR2Scores",
    "VQAAccuracy",
    "caption_tokens",
]
