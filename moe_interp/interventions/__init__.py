"""Interventions: each is a plain list of (hook name, function) for ``run_with_hooks(fwd_hooks=...)`` or ``hooks()``.

They are pure functions of the hooked tensors and compose: concatenate the lists; later functions see what earlier
ones wrote.
"""

from moe_interp.interventions.ablate import ablate_experts
from moe_interp.interventions.force import force_experts, set_routes, swap_experts
from moe_interp.interventions.neurons import ablate_neurons, clamp_neurons
from moe_interp.interventions.rank import change_top_k, promote_experts, suppress_experts
from moe_interp.interventions.replay import replay_routes, routes_from
from moe_interp.interventions.router import bias_router, random_routing, router_temperature, uniform_routing

__all__ = [
    "ablate_experts",
    "ablate_neurons",
    "bias_router",
    "change_top_k",
    "clamp_neurons",
    "force_experts",
    "promote_experts",
    "random_routing",
    "replay_routes",
    "router_temperature",
    "routes_from",
    "set_routes",
    "suppress_experts",
    "swap_experts",
    "uniform_routing",
]
