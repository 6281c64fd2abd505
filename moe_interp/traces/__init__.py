"""Recorded routing: the trace, its files, and what can be measured on it."""

from moe_interp.traces.counts import RoutingCounts
from moe_interp.traces.expert_use import co_activation, load, saturation, standing_committee, transitions
from moe_interp.traces.measures.comparison import risk_difference, usage_correlation
from moe_interp.traces.measures.domains import domain_differences
from moe_interp.traces.measures.outputs import expert_norms, router_margin
from moe_interp.traces.measures.paths import expert_paths
from moe_interp.traces.measures.vocabulary import vocabulary_specialization
from moe_interp.traces.parts import read_parts
from moe_interp.traces.specialization import domain_specialization, esft_experts, esft_scores
from moe_interp.traces.trace import RoutingTrace

__all__ = [
    "RoutingCounts",
    "RoutingTrace",
    "co_activation",
    "domain_differences",
    "domain_specialization",
    "esft_experts",
    "esft_scores",
    "expert_norms",
    "expert_paths",
    "load",
    "read_parts",
    "risk_difference",
    "router_margin",
    "saturation",
    "standing_committee",
    "transitions",
    "usage_correlation",
    "vocabulary_specialization",
]
