"""Routes that a linear map gives to the same states: the router's own, and random ones, also on whitened states."""

from __future__ import annotations

import numpy as np

from moe_interp.errors import DataError
from moe_interp.experiments.geometry.states import BoolArray, IntArray
from moe_interp.stats.checks import FloatArray
from moe_interp.stats.geometry.arrays import PrincipalAxes


def top_sets(logits: FloatArray, width: IntArray) -> BoolArray:
    """``[token, expert]``: as many experts of the largest logits as each token's ``width``."""
    n = int(width.max(initial=0))
    best = np.argsort(-logits, axis=1, kind="stable")[:, :n]
    sets = np.zeros(logits.shape, dtype=bool)
    np.put_along_axis(sets, best, np.arange(n) < width[:, None], axis=1)
    return sets


def random_routes(states: FloatArray, n_experts: int, width: IntArray, rng: np.random.Generator) -> BoolArray:
    """The routes of a linear router with independent normal weights."""
    return top_sets(states @ rng.standard_normal((states.shape[1], n_experts)), width)


def whitened(states: FloatArray, axes: PrincipalAxes, variance: float = 0.99) -> FloatArray:
    """Centred states with the same variance along every principal axis that is kept, ``[token, axis]``.

    Axes are kept until they hold ``variance``, and at most one for every ten tokens: with as many axes as tokens all
    whitened states are equally far apart, whatever they were.
    """
    mean, singular, directions = axes
    held = np.cumsum(singular**2) / (singular**2).sum()
    n = min(int(np.searchsorted(held, variance)) + 1, max(1, len(states) // 10), len(singular))
    return ((states - mean) @ directions[:n].T) / singular[:n] * np.sqrt(len(states))


def check_varies(variance: FloatArray, layers: tuple[int, ...]) -> None:
    """Refuse states that are all the same at a layer.

    Raises:
        DataError: with the layer.
    """
    flat = ~(variance > 0)
    if flat.any():
        raise DataError(
            f"router inputs of layer {layers[int(np.argmax(flat))]} without variance",
            "states that differ between tokens",
            "Pass other sequences, or leave the layer out.",
        )
