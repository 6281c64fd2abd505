"""Activation patching over routers and experts, in TransformerLens' form."""

from moe_interp.patching.result import EffectResult, PatchingSweep
from moe_interp.patching.sweeps import expert_out, router_logits, routes, shared_out

__all__ = ["EffectResult", "PatchingSweep", "expert_out", "router_logits", "routes", "shared_out"]
