"""Samplers: which share of the training rows each task gets, one way a file."""

from moadapt.sampling.annealed import Annealed
from moadapt.sampling.capped import Capped
from moadapt.sampling.dynamic import Dynamic
from moadapt.sampling.proportional import Proportional
from moadapt.sampling.round_robin import RoundRobin
from moadapt.sampling.sampler import Known, Sampler
from moadapt.sampling.temperature import Temperature
from moadapt.sampling.uniform import Uniform

__all__ = [
    "Annealed",
    "Capped",
    "Dynamic",
    "Known",
    "Proportional",
    "RoundRobin",
    "Sampler",
    "Temperature",
    "Uniform",
]
