"""Figures of pass@K."""

from moe_interp.plots.pass_at_k.curve import pass_at_k

__all__ = ["pass_at_k"]
