"""Figures of the geometry of routing, one a file."""

from moe_interp.plots.geometry.depth_overlap import depth_overlap
from moe_interp.plots.geometry.layer_agreement import layer_agreement
from moe_interp.plots.geometry.layer_overlap import layer_overlap
from moe_interp.plots.geometry.shared_direction import shared_direction
from moe_interp.plots.geometry.similarity import bound_scatter, similarity_scatter

__all__ = [
    "bound_scatter",
    "depth_overlap",
    "layer_agreement",
    "layer_overlap",
    "shared_direction",
    "similarity_scatter",
]
