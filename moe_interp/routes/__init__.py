"""Counterfactual routes: sampling them, and scoring them exactly and fast."""

from moe_interp.routes.audit import ScreenAudit
from moe_interp.routes.branch_scores import LayerRoutes, RouteScores
from moe_interp.routes.inputs import check_routes
from moe_interp.routes.sample import (
    AllSubsets,
    GumbelTopK,
    OneSwap,
    RouteSampler,
    SampledRoutes,
    TokenKeys,
    UniformSubsets,
)
from moe_interp.routes.score import Method, SlowRoutesWarning, score_from_base, score_joint_routes, score_routes
from moe_interp.routes.screen import ScreenedRoutes, own_gradients, route_credits, screen_from_base, screen_routes

__all__ = [
    "AllSubsets",
    "GumbelTopK",
    "LayerRoutes",
    "Method",
    "OneSwap",
    "RouteSampler",
    "RouteScores",
    "SampledRoutes",
    "ScreenAudit",
    "ScreenedRoutes",
    "SlowRoutesWarning",
    "TokenKeys",
    "UniformSubsets",
    "check_routes",
    "own_gradients",
    "route_credits",
    "score_from_base",
    "score_joint_routes",
    "score_routes",
    "screen_from_base",
    "screen_routes",
]
