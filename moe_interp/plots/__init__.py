"""Figures: a result in, a matplotlib Figure out. No formula of their own, and no global state."""

from moe_interp.plots.atlas import co_activation_map, domain_map, layer_curves, load_bars, transition_flow
from moe_interp.plots.calibration_scatter import calibration_scatter
from moe_interp.plots.confidence import confidence
from moe_interp.plots.contrast_map import contrast_map
from moe_interp.plots.dominance import dominance
from moe_interp.plots.figure import save_figure, to_svg
from moe_interp.plots.figures import FIGURES
from moe_interp.plots.layer_impact import layer_impact
from moe_interp.plots.layer_regret import layer_regret
from moe_interp.plots.pass_at_k import pass_at_k
from moe_interp.plots.regret_curve import regret_curve
from moe_interp.plots.router_scores import router_scores
from moe_interp.plots.router_tuning.curves import tuning_curves
from moe_interp.plots.router_tuning.held_out import tuning_held_out
from moe_interp.plots.sorted_p import sorted_p
from moe_interp.plots.specialization_map import specialization_map
from moe_interp.plots.testbed.gain_over_training import gain_over_training
from moe_interp.plots.testbed.strategies import strategies

__all__ = [
    "FIGURES",
    "calibration_scatter",
    "co_activation_map",
    "confidence",
    "contrast_map",
    "domain_map",
    "dominance",
    "layer_curves",
    "gain_over_training",
    "layer_impact",
    "layer_regret",
    "load_bars",
    "pass_at_k",
    "regret_curve",
    "router_scores",
    "save_figure",
    "sorted_p",
    "specialization_map",
    "strategies",
    "to_svg",
    "transition_flow",
    "tuning_curves",
    "tuning_held_out",
]
