"""Mixture of experts: routers, dispatches, losses and statistics.

The names exported here are the interface for routers outside this package.
"""

from nanomoe.moe.routers import Router
from nanomoe.moe.routing import RouterInputs, Routing, make_routing

__all__ = ['Router', 'RouterInputs', 'Routing', 'make_routing']
