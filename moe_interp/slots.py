"""Slots of a route. Importable without torch, as recorded routes are."""

EMPTY = -1
"""The expert id of an empty slot: weight 0, output zero, skipped by every measure."""
