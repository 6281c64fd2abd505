"""Activation patching over routers and experts, in TransformerLens' form.

``sweeps.py`` has the sweeps, ``patches.py`` what they replace, ``cells.py`` their axes. ``sweep_run.py`` runs a sweep,
and ``passes.py`` starts its passes in a recorded one. ``attribution.py`` estimates the same cells by a gradient.
``logits`` holds direct logit attribution; ``effects`` holds decomposition, path patching and causal tracing.
"""

from moe_interp.patching.attribution import attribution
from moe_interp.patching.attribution_result import Agreement, AttributionResult
from moe_interp.patching.effects.causal_tracing import ExpertTrace, trace_experts
from moe_interp.patching.effects.decomposition import Decomposition, decompose
from moe_interp.patching.effects.path_patching import PathResult, path_patching
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
    "ExpertTrace",
    "LogitAttribution",
    "PatchingSweep",
    "attribution",
    "PathResult",
    "decompose",
    "expert_out",
    "expert_tokens",
    "logit_attribution",
    "path_patching",
    "router_logits",
    "routes",
    "shared_out",
    "trace_experts",
]
