"""Recorded routing: the trace, its files, and what can be measured on it."""

from moe_interp.traces.trace import RoutingTrace

__all__ = ["RoutingTrace"]
