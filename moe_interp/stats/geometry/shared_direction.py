"""How strongly a router reads the direction that all states share, against other directions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moe_interp.errors import DataError
from moe_interp.stats.checks import FloatArray, check_at_least
from moe_interp.stats.geometry.arrays import PrincipalAxes, principal_axes, weights_and_states
from moe_interp.stats.random_generators import derive_rng


@dataclass(frozen=True)
class SharedDirection:
    """Gains of a router: length of the centred logits ``Pi_e W x`` for an input ``x`` of length 1, in logits.

    Attributes:
        gain: Along the shared direction, ``||Pi_e W mu_hat||``.
        mean_norm: ``||mu||``; ``gain * mean_norm`` is what the shared direction adds to every token's logits.
        random_gain: Root mean square over all directions, exactly: ``||Pi_e W||_F / sqrt(d)``.
        random: ``[draw]``, along directions drawn uniformly.
        component: ``[component]``, along the first principal axes of the centred states.
        component_variance: ``[component]``, the share of the centred states' variance on that axis.
        centred_gain: Of what is not shared, weighted as it occurs: ``rms ||Pi_e W (h - mu)|| / rms ||h - mu||``.
        centred_rms: ``rms ||Pi_e W (h - mu)||``, in logits.
        p_suppressed: ``(1 + #{random <= gain}) / (1 + draws)``: small where the router reads the shared direction less
            than it reads a random one.
    """

    gain: float
    mean_norm: float
    random_gain: float
    random: FloatArray
    component: FloatArray
    component_variance: FloatArray
    centred_gain: float
    centred_rms: float
    p_suppressed: float


def shared_direction(
    weights: ArrayLike,
    states: ArrayLike,
    *,
    n_random: int = 999,
    n_components: int = 8,
    seed: int = 0,
    axes: PrincipalAxes | None = None,
) -> SharedDirection:
    """The router's gain along the shared direction, ``||Pi_e W mu_hat||``, with its controls.

    ``mu`` is the mean state, ``mu_hat = mu / ||mu||``, and ``Pi_e = I - 11'/E`` takes away what all experts' logits
    have in common, which moves no ranking and no softmax. A shared direction moves the same experts' logits up for
    every token; the claim of the source is that a loss that balances the load therefore brings the gain near 0. A bias
    of the router takes no part.

    Args:
        weights: ``[expert, d]``, the router's linear map.
        states: ``[token, d]``, what that map reads, padding left out.
        n_random: Random directions, uniform on the sphere.
        n_components: Principal axes of the centred states, as many as there are at most.
        axes: :func:`.arrays.principal_axes` of the same states, where they are known.

    Raises:
        DataError: shapes that do not fit, values that are not finite, states without variance or of mean 0.

    Source: "The Myth of Expert Specialization in MoEs" for the claim; the controls are derived. What it does not show:
    why the gain is small. Random directions are not those that occur; ``component`` and ``centred_gain`` are.
    """
    check_at_least(n_random, 1, "n_random")
    check_at_least(n_components, 1, "n_components")
    weight, state = weights_and_states(weights, states)
    centred_weight = centred_logits(weight)
    mean, singular, directions = axes or principal_axes(state)
    norm = float(np.linalg.norm(mean))
    if norm == 0:
        raise DataError("states with mean 0", "a mean that has a direction", "Pass the router's inputs, not centred.")
    drawn = derive_rng(seed, "shared_direction").standard_normal((n_random, state.shape[1]))
    random = gains(centred_weight, drawn)
    gain = float(gains(centred_weight, mean[None])[0])
    variance = singular**2
    per_axis = gains(centred_weight, directions)
    return SharedDirection(
        gain=gain,
        mean_norm=norm,
        random_gain=float(np.linalg.norm(centred_weight) / np.sqrt(weight.shape[1])),
        random=random,
        component=per_axis[:n_components],
        component_variance=(variance / variance.sum())[:n_components],
        centred_gain=float(np.sqrt((variance * per_axis**2).sum() / variance.sum())),
        centred_rms=float(np.sqrt((variance * per_axis**2).sum() / len(state))),
        p_suppressed=float((1 + (random <= gain).sum()) / (1 + n_random)),
    )


def centred_logits(weights: FloatArray) -> FloatArray:
    """``Pi_e W``: the weight without what all experts have in common."""
    return weights - weights.mean(-2, keepdims=True)


def gains(centred_weight: FloatArray, directions: FloatArray) -> FloatArray:
    """``||Pi_e W u|| / ||u||`` for directions ``[direction, d]``; 0 for a direction of length 0."""
    length = np.linalg.norm(directions, axis=-1)
    moved = np.linalg.norm(directions @ centred_weight.T, axis=-1)
    return np.where(length > 0, moved / np.where(length > 0, length, 1), 0.0)
