"""moe_interp: Mixture-of-Experts layers as HookPoints of a TransformerLens bridge, and experiments on them.

The names below are resolved on first use, so that ``import moe_interp`` stays as light as TransformerLens' bridge.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# public name -> module that defines it; "moe_interp.<name>" is that module itself
_HOME = {
    "MoEInterpError": "moe_interp.errors",
    "RoutingTrace": "moe_interp.traces",
    "load_result": "moe_interp.results",
    "traces": "moe_interp.traces",
    "testbed": "moe_interp.testbed",
    "AllSubsets": "moe_interp.routes",
    "GumbelTopK": "moe_interp.routes",
    "OneSwap": "moe_interp.routes",
    "UniformSubsets": "moe_interp.routes",
    "score_routes": "moe_interp.routes",
    "screen_routes": "moe_interp.routes",
    "CounterfactualResult": "moe_interp.experiments.counterfactual_result",
    "counterfactual_routes": "moe_interp.experiments.counterfactual",
    "DomainRouterResult": "moe_interp.experiments.domain_router",
    "IsolationResult": "moe_interp.experiments.isolation_result",
    "domain_router": "moe_interp.experiments.domain_router",
    "isolate_experts": "moe_interp.experiments.isolation",
    "load_demo": "moe_interp.testbed.bundled",
    "load_items": "moe_interp.experiments.items",
    "load_sequences": "moe_interp.experiments.sequence_texts",
    "score_domain_router": "moe_interp.experiments.domain_router",
    "MoEHooks": "moe_interp.hooks.attach",
    "attach": "moe_interp.hooks.attach",
    "attached": "moe_interp.hooks.attach",
    "support_table": "moe_interp.hooks.support",
    "ablate_experts": "moe_interp.interventions",
    "bias_router": "moe_interp.interventions",
    "force_experts": "moe_interp.interventions",
    "random_routing": "moe_interp.interventions",
    "replay_routes": "moe_interp.interventions",
    "set_routes": "moe_interp.interventions",
    "uniform_routing": "moe_interp.interventions",
    "stats": "moe_interp.stats",
}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    try:
        home = _HOME[name]
    except KeyError:
        known = ", ".join(__all__)
        raise AttributeError(f"module 'moe_interp' has no attribute {name!r}; public names: {known}") from None
    module = import_module(home)
    value = module if home == f"moe_interp.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
