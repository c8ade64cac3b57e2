"""Many adapters on one frozen transformers model, and a router that learns which of them each input needs."""

from moadapt.attaching import attach, load
from moadapt.initialising import initialise
from moadapt.mixture import Mixture, MixtureSpec
from moadapt.placement import Placement
from moadapt.routing import Router, RouterSpec, Routing, RoutingContext
from moadapt.sites import anatomy

__all__ = [
    "Mixture",
    "MixtureSpec",
    "Placement",
    "Router",
    "RouterSpec",
    "Routing",
    "RoutingContext",
    "anatomy",
    "attach",
    "initialise",
    "load",
]
__version__ = "0.1.0"
