"""Figures of patching results."""

from moe_interp.plots.patching.effect_map import effect_map

__all__ = ["effect_map"]
