"""Recorded routing: the trace, its files, and what can be measured on it."""

from moe_interp.traces.counts import RoutingCounts
from moe_interp.traces.expert_use import co_activation, load, saturation, standing_committee, transitions
from moe_interp.traces.parts import read_parts
from moe_interp.traces.specialization import (
    domain_specialization,
    esft_experts,
    esft_scores,
    vocabulary_specialization,
)
from moe_interp.traces.trace import RoutingTrace

__all__ = [
    "RoutingCounts",
    "RoutingTrace",
    "co_activation",
    "domain_specialization",
    "esft_experts",
    "esft_scores",
    "load",
    "read_parts",
    "saturation",
    "standing_committee",
    "transitions",
    "vocabulary_specialization",
]
