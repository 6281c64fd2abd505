"""moe_interp: Mixture-of-Experts layers as HookPoints of a TransformerLens bridge, and experiments on them.

The names below are resolved on first use, so that ``import moe_interp`` stays as light as TransformerLens' bridge.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers and editors; a test compares the two lists
    # isort: off
    from moe_interp import patching as patching, stats as stats, testbed as testbed, traces as traces
    from moe_interp.errors import MoEInterpError as MoEInterpError
    from moe_interp.engine.decoding.batch_invariant import batch_invariant as batch_invariant
    from moe_interp.experiments.capture.experiment import capture_routing as capture_routing
    from moe_interp.experiments.capture.recorded import RecordedRouting as RecordedRouting
    from moe_interp.experiments.contrast.experiment import contrast_experts as contrast_experts
    from moe_interp.experiments.contrast.result import ContrastResult as ContrastResult
    from moe_interp.experiments.contrast.steering import Completion as Completion, steering_effect as steering_effect
    from moe_interp.experiments.contrast.steering_result import SteeringResult as SteeringResult
    from moe_interp.experiments.counterfactual.experiment import counterfactual_routes as counterfactual_routes
    from moe_interp.experiments.counterfactual.result import CounterfactualResult as CounterfactualResult
    from moe_interp.experiments.domain_router import (
        domain_router as domain_router,
        DomainRouterResult as DomainRouterResult,
        score_domain_router as score_domain_router,
    )
    from moe_interp.experiments import geometry as geometry
    from moe_interp.experiments.geometry.result import GeometryResult as GeometryResult
    from moe_interp.experiments.isolation.experiment import isolate_experts as isolate_experts
    from moe_interp.experiments.isolation.result import IsolationResult as IsolationResult
    from moe_interp.experiments.router_tuning.delta import RouterDelta as RouterDelta
    from moe_interp.experiments.router_tuning.experiment import tune_router as tune_router
    from moe_interp.experiments.router_tuning.result import RouterTuningResult as RouterTuningResult
    from moe_interp.experiments.show_routing import show as show
    from moe_interp.experiments.inputs.items import load_items as load_items
    from moe_interp.experiments.inputs.sequence_texts import load_sequences as load_sequences
    from moe_interp.experiments.pass_at_k.experiment import evaluate_pass_at_k as evaluate_pass_at_k
    from moe_interp.experiments.pass_at_k.problems import load_problems as load_problems
    from moe_interp.experiments.pass_at_k.result import PassAtKResult as PassAtKResult
    from moe_interp.hooks.attach import attach as attach, attached as attached, MoEHooks as MoEHooks
    from moe_interp.hooks.support_table import support_table as support_table
    from moe_interp.interventions import (
        ablate_experts as ablate_experts,
        ablate_neurons as ablate_neurons,
        bias_router as bias_router,
        change_top_k as change_top_k,
        clamp_neurons as clamp_neurons,
        force_experts as force_experts,
        promote_experts as promote_experts,
        random_routing as random_routing,
        replay_routes as replay_routes,
        router_temperature as router_temperature,
        routes_from as routes_from,
        set_routes as set_routes,
        suppress_experts as suppress_experts,
        swap_experts as swap_experts,
        uniform_routing as uniform_routing,
    )
    from moe_interp.results import load_result as load_result
    from moe_interp.routing_view import RoutingView as RoutingView
    from moe_interp.routes import (
        AllSubsets as AllSubsets,
        GumbelTopK as GumbelTopK,
        OneSwap as OneSwap,
        score_routes as score_routes,
        screen_routes as screen_routes,
        UniformSubsets as UniformSubsets,
    )
    from moe_interp.stats import pass_at_k as pass_at_k
    from moe_interp.testbed.bundled import load_demo as load_demo
    from moe_interp.traces import RoutingCounts as RoutingCounts, RoutingTrace as RoutingTrace
    from moe_interp.traces.atlas.build import atlas as atlas
    from moe_interp.traces.atlas.result import AtlasResult as AtlasResult
    # isort: on

# public name -> module that defines it; "moe_interp.<name>" is that module itself
_HOME = {
    "MoEInterpError": "moe_interp.errors",
    "AtlasResult": "moe_interp.traces.atlas.result",
    "RoutingCounts": "moe_interp.traces",
    "RoutingTrace": "moe_interp.traces",
    "atlas": "moe_interp.traces.atlas.build",
    "load_result": "moe_interp.results",
    "patching": "moe_interp.patching",
    "traces": "moe_interp.traces",
    "testbed": "moe_interp.testbed",
    "AllSubsets": "moe_interp.routes",
    "GumbelTopK": "moe_interp.routes",
    "OneSwap": "moe_interp.routes",
    "UniformSubsets": "moe_interp.routes",
    "score_routes": "moe_interp.routes",
    "screen_routes": "moe_interp.routes",
    "RecordedRouting": "moe_interp.experiments.capture.recorded",
    "batch_invariant": "moe_interp.engine.decoding.batch_invariant",
    "capture_routing": "moe_interp.experiments.capture.experiment",
    "Completion": "moe_interp.experiments.contrast.steering",
    "ContrastResult": "moe_interp.experiments.contrast.result",
    "SteeringResult": "moe_interp.experiments.contrast.steering_result",
    "contrast_experts": "moe_interp.experiments.contrast.experiment",
    "steering_effect": "moe_interp.experiments.contrast.steering",
    "CounterfactualResult": "moe_interp.experiments.counterfactual.result",
    "counterfactual_routes": "moe_interp.experiments.counterfactual.experiment",
    "DomainRouterResult": "moe_interp.experiments.domain_router",
    "IsolationResult": "moe_interp.experiments.isolation.result",
    "RouterDelta": "moe_interp.experiments.router_tuning.delta",
    "RouterTuningResult": "moe_interp.experiments.router_tuning.result",
    "tune_router": "moe_interp.experiments.router_tuning.experiment",
    "show": "moe_interp.experiments.show_routing",
    "RoutingView": "moe_interp.routing_view",
    "domain_router": "moe_interp.experiments.domain_router",
    "GeometryResult": "moe_interp.experiments.geometry.result",
    "geometry": "moe_interp.experiments",
    "isolate_experts": "moe_interp.experiments.isolation.experiment",
    "load_demo": "moe_interp.testbed.bundled",
    "load_items": "moe_interp.experiments.inputs.items",
    "load_sequences": "moe_interp.experiments.inputs.sequence_texts",
    "PassAtKResult": "moe_interp.experiments.pass_at_k.result",
    "evaluate_pass_at_k": "moe_interp.experiments.pass_at_k.experiment",
    "load_problems": "moe_interp.experiments.pass_at_k.problems",
    "pass_at_k": "moe_interp.stats",
    "score_domain_router": "moe_interp.experiments.domain_router",
    "MoEHooks": "moe_interp.hooks.attach",
    "attach": "moe_interp.hooks.attach",
    "attached": "moe_interp.hooks.attach",
    "support_table": "moe_interp.hooks.support_table",
    "ablate_experts": "moe_interp.interventions",
    "bias_router": "moe_interp.interventions",
    "force_experts": "moe_interp.interventions",
    "random_routing": "moe_interp.interventions",
    "replay_routes": "moe_interp.interventions",
    "set_routes": "moe_interp.interventions",
    "uniform_routing": "moe_interp.interventions",
    "ablate_neurons": "moe_interp.interventions",
    "change_top_k": "moe_interp.interventions",
    "clamp_neurons": "moe_interp.interventions",
    "promote_experts": "moe_interp.interventions",
    "router_temperature": "moe_interp.interventions",
    "routes_from": "moe_interp.interventions",
    "suppress_experts": "moe_interp.interventions",
    "swap_experts": "moe_interp.interventions",
    "stats": "moe_interp.stats",
}

# kind of a result -> module that defines its class, imported when such a file is loaded
RESULT_KINDS = {
    "atlas": "moe_interp.traces.atlas.result",
    "isolation": "moe_interp.experiments.isolation.result",
    "domain_router": "moe_interp.experiments.domain_router",
    "contrast": "moe_interp.experiments.contrast.result",
    "counterfactual": "moe_interp.experiments.counterfactual.result",
    "geometry": "moe_interp.experiments.geometry.result",
    "steering": "moe_interp.experiments.contrast.steering_result",
    "pass_at_k": "moe_interp.experiments.pass_at_k.result",
    "router_tuning": "moe_interp.experiments.router_tuning.result",
    "testbed": "moe_interp.testbed.comparison",
    "patching": "moe_interp.patching.result",
    "logit_attribution": "moe_interp.patching.logits.attribution",
    "expert_tokens": "moe_interp.patching.logits.expert_tokens",
    "decomposition": "moe_interp.patching.effects.decomposition",
    "attribution": "moe_interp.patching.attribution_result",
    "paths": "moe_interp.patching.effects.path_patching",
    "trace": "moe_interp.patching.effects.causal_tracing",
}
# what a result asks to be shown by -> where it is, imported when a figure or a page is asked for
RESULT_VIEWS = {
    "figures": "moe_interp.plots.figures:FIGURES",  # kind -> name -> function of a result
    "report": "moe_interp.report.page_of:write_result",
}

__all__ = sorted(_HOME)
__version__ = "0.1.0"

if not TYPE_CHECKING:  # a type checker that saw it would accept any name

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            from difflib import get_close_matches  # takes longer than all the rest of this import

            near = get_close_matches(name, __all__, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Public names: {', '.join(__all__)}."
            raise AttributeError(f"module 'moe_interp' has no attribute {name!r}.{hint}")
        home = import_module(_HOME[name])
        if _HOME[name] == f"moe_interp.{name}":
            value = home
        else:  # a name of that module, or a subpackage that it does not import by itself
            value = getattr(home, name, None) or import_module(f"{_HOME[name]}.{name}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
