"""Balance between tasks: whose loss counts how much, and what is done about gradients that oppose one another."""

from moadapt.balancing.balance import Balance, Balancer
from moadapt.balancing.cagrad import CAGrad
from moadapt.balancing.dynamic_average import DynamicAverage
from moadapt.balancing.fixed import Fixed
from moadapt.balancing.gradnorm import GradNorm
from moadapt.balancing.pcgrad import PCGrad
from moadapt.balancing.uncertainty import Uncertainty

__all__ = ["Balance", "Balancer", "CAGrad", "DynamicAverage", "Fixed", "GradNorm", "PCGrad", "Uncertainty"]
