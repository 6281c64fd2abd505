"""Figures of an atlas of recorded routing."""

from moe_interp.plots.atlas.co_activation import co_activation_map
from moe_interp.plots.atlas.domains import domain_map
from moe_interp.plots.atlas.layers import layer_curves
from moe_interp.plots.atlas.load import load_bars
from moe_interp.plots.atlas.transitions import transition_flow

__all__ = ["co_activation_map", "domain_map", "layer_curves", "load_bars", "transition_flow"]
