"""The geometry of routing: how far routes follow from the states that routers read."""

from moe_interp.experiments.geometry.experiment import measure
from moe_interp.experiments.geometry.matching import layer_overlap
from moe_interp.experiments.geometry.measures import (
    explained_by_geometry,
    linear_bounds,
    route_vs_hidden_similarity,
    routed_states,
    shared_direction,
)
from moe_interp.experiments.geometry.model_pass import router_weights
from moe_interp.experiments.geometry.overlap import answer_overlap, depth_overlap
from moe_interp.experiments.geometry.result import GeometryResult

__all__ = [
    "GeometryResult",
    "answer_overlap",
    "depth_overlap",
    "explained_by_geometry",
    "layer_overlap",
    "linear_bounds",
    "measure",
    "route_vs_hidden_similarity",
    "routed_states",
    "router_weights",
    "shared_direction",
]
