"""Many adapters on one frozen transformers model, and a router that learns which of them each input needs."""

from moadapt.attaching import attach, load
from moadapt.averaging import average
from moadapt.changing import add_adapters, remove_adapters
from moadapt.composing import compose, reroute
from moadapt.fitting import fit_router
from moadapt.initialising import initialise
from moadapt.mixture import Mixture
from moadapt.mixture_spec import MixtureSpec
from moadapt.placement import Placement
from moadapt.router import Router, RouterSpec, RoutingContext
from moadapt.routing import Routing
from moadapt.routing_regret import routing_regret
from moadapt.sites import anatomy
from moadapt.subtracting import subtract_general

__all__ = [
    "Mixture",
    "MixtureSpec",
    "Placement",
    "Router",
    "RouterSpec",
    "Routing",
    "RoutingContext",
    "add_adapters",
    "anatomy",
    "attach",
    "average",
    "compose",
    "fit_router",
    "initialise",
    "load",
    "remove_adapters",
    "reroute",
    "routing_regret",
    "subtract_general",
]
__version__ = "0.1.0"
