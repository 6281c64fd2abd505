"""Interventions: each is a plain list of (hook name, function) for ``run_with_hooks(fwd_hooks=...)`` or ``hooks()``.

They are pure functions of the hooked tensors and compose: concatenate the lists; later functions see what earlier
ones wrote.
"""

from moe_interp.interventions.ablate import ablate_experts
from moe_interp.interventions.force import force_experts, set_routes
from moe_interp.interventions.replay import replay_routes
from moe_interp.interventions.router import bias_router, random_routing, uniform_routing

__all__ = [
    "ablate_experts",
    "bias_router",
    "force_experts",
    "random_routing",
    "replay_routes",
    "set_routes",
    "uniform_routing",
]
