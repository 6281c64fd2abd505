"""Checks on the arrays that geometry takes: a router's weight, the states it reads, and routes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from moe_interp.errors import DataError
from moe_interp.stats.checks import FloatArray, real_numbers


def matrix(values: ArrayLike, name: str, axes: str) -> FloatArray:
    """A finite float64 matrix with at least one row and one column.

    Raises:
        DataError: another shape, or values that are not finite.
    """
    array = real_numbers(values, name)
    if array.ndim != 2 or 0 in array.shape:
        raise DataError(f"{name} of shape {array.shape}", f"{axes}, at least one of each", f"Reshape {name}.")
    if not np.isfinite(array).all():
        raise DataError(
            f"{name} with {int((~np.isfinite(array)).sum())} values that are not finite",
            "finite numbers",
            "Look for an overflow in the model; run it in bfloat16 or float32 instead of float16.",
        )
    return array


def weights_and_states(weights: ArrayLike, states: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """A router's weight ``[expert, d]`` and the states ``[token, d]`` that it reads.

    Raises:
        DataError: not finite matrices of one width.
    """
    weight, state = matrix(weights, "weights", "[expert, d_model]"), matrix(states, "states", "[token, d_model]")
    if weight.shape[1] != state.shape[1]:
        raise DataError(
            f"weights of shape {weight.shape} and states of shape {state.shape}",
            "[expert, d_model] and [token, d_model] of one d_model",
            "Take the weight and the inputs of one layer's router.",
        )
    return weight, state


PrincipalAxes = tuple[FloatArray, FloatArray, FloatArray]


def principal_axes(states: FloatArray) -> PrincipalAxes:
    """The mean ``[d]``, singular values ``[axis]`` (largest first) and axes ``[axis, d]`` of the centred states.

    Axes without variance (below the largest by more than the rounding of the states' own sums) are left out.

    Raises:
        DataError: states without variance.
    """
    mean = states.mean(0)
    _, singular, axes = np.linalg.svd(states - mean, full_matrices=False)
    # subtracting the mean leaves its rounding behind
    rounding = np.finfo(np.float64).eps * max(states.shape)
    least = rounding * max(float(singular[0]), float(np.abs(states).max()))
    kept = singular > least
    if not kept.any():
        raise DataError(
            f"{len(states)} states without variance",
            "at least two states that differ",
            "Pass the states of several tokens of several sequences.",
        )
    return mean, singular[kept], axes[kept]
