"""Slots of a route. Importable without torch, as recorded routes are."""

EMPTY = -1
"""The expert id of an empty slot: weight 0, output zero, skipped by every measure."""

NATIVE = -2
"""The id in every slot of a row that a trace does not cover: the model's own router decides there."""
