"""Activation patching over routers and experts, in TransformerLens' form."""

from moe_interp.patching.attribution import attribution
from moe_interp.patching.attribution_result import Agreement, AttributionResult
from moe_interp.patching.decomposition import Decomposition, decompose
from moe_interp.patching.logits.attribution import LogitAttribution, logit_attribution
from moe_interp.patching.logits.expert_tokens import ExpertTokens, expert_tokens
from moe_interp.patching.result import EffectResult, PatchingSweep
from moe_interp.patching.sweeps import expert_out, router_logits, routes, shared_out

__all__ = [
    "Agreement",
    "AttributionResult",
    "Decomposition",
    "EffectResult",
    "ExpertTokens",
    "LogitAttribution",
    "PatchingSweep",
    "attribution",
    "decompose",
    "expert_out",
    "expert_tokens",
    "logit_attribution",
    "router_logits",
    "routes",
    "shared_out",
]
