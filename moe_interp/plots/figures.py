"""The figures of each kind of result, by name; the first is the one that ``result.plot()`` shows."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from moe_interp.plots.atlas import co_activation_map, domain_map, layer_curves, load_bars, transition_flow
from moe_interp.plots.calibration_scatter import calibration_scatter
from moe_interp.plots.confidence import confidence
from moe_interp.plots.contrast_map import contrast_map
from moe_interp.plots.dominance import dominance
from moe_interp.plots.geometry import (
    bound_scatter,
    depth_overlap,
    layer_agreement,
    layer_overlap,
    shared_direction,
    similarity_scatter,
)
from moe_interp.plots.layer_impact import layer_impact
from moe_interp.plots.layer_regret import layer_regret
from moe_interp.plots.pass_at_k import pass_at_k
from moe_interp.plots.patching import effect_map
from moe_interp.plots.patching.decomposition import decomposition
from moe_interp.plots.patching.logit_attribution import logit_attribution
from moe_interp.plots.patching.paths import paths
from moe_interp.plots.patching.trace import trace
from moe_interp.plots.regret_curve import regret_curve
from moe_interp.plots.router_scores import router_scores
from moe_interp.plots.router_tuning.curves import tuning_curves
from moe_interp.plots.router_tuning.held_out import tuning_held_out
from moe_interp.plots.sorted_p import sorted_p
from moe_interp.plots.specialization_map import specialization_map
from moe_interp.plots.testbed.gain_over_training import gain_over_training
from moe_interp.plots.testbed.strategies import strategies

FIGURES: dict[str, dict[str, Callable[..., Figure]]] = {
    "isolation": {
        "specialization": specialization_map,
        "calibration": calibration_scatter,
        "dominance": dominance,
        "layer_impact": layer_impact,
        "sorted_p": sorted_p,
    },
    "counterfactual": {"confidence": confidence, "regret_curve": regret_curve, "layer_regret": layer_regret},
    "geometry": {
        "similarity": similarity_scatter,
        "bound": bound_scatter,
        "shared_direction": shared_direction,
        "depth_overlap": depth_overlap,
        "layer_agreement": layer_agreement,
        "layer_overlap": layer_overlap,
    },
    "domain_router": {"router_scores": router_scores},
    "contrast": {"contrast": contrast_map},
    "atlas": {
        "domains": domain_map,
        "layers": layer_curves,
        "load": load_bars,
        "co_activation": co_activation_map,
        "transitions": transition_flow,
    },
    "pass_at_k": {"pass_at_k": pass_at_k},
    "testbed": {"strategies": strategies, "shared_direction": gain_over_training},
    "patching": {"effects": effect_map},
    "attribution": {"effects": effect_map},
    "logit_attribution": {"contributions": logit_attribution},
    "decomposition": {"split": decomposition},
    "paths": {"paths": paths},
    "trace": {"recovered": trace},
    "router_tuning": {"curves": tuning_curves, "held_out": tuning_held_out},
}
