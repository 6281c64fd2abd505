"""How far apart a linear router can put two states, and how close together: both directions of the bound."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moe_interp.stats.checks import FloatArray, check_share
from moe_interp.stats.geometry.arrays import PrincipalAxes, principal_axes, weights_and_states


@dataclass(frozen=True)
class LinearBound:
    """The constants of a linear router on given states.

    Attributes:
        upper: ``||W Pi_r||``, the largest singular value of the map on the principal subspace, in logits per unit of
            state.
        lower: ``sigma_min+(W Pi_r)``, its smallest singular value above rounding.
        remainder: ``||W (I - Pi_r)||`` on the rest of the states' span; 0 where ``Pi_r`` is all of it.
        rank: Dimension r of the principal subspace.
        seen_rank: Dimension of the part of it that moves a logit; at most the number of experts.
        axes: ``[axis, d]``, an orthonormal basis of the principal subspace.
        seen_axes: ``[axis, d]``, an orthonormal basis of the part that moves a logit.
    """

    upper: float
    lower: float
    remainder: float
    rank: int
    seen_rank: int
    axes: FloatArray
    seen_axes: FloatArray

    def distances(self, differences: ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Of differences of two states ``[pair, d]``: their length, its part in ``Pi_r``, its part that is seen."""
        delta = np.asarray(differences, dtype=np.float64)
        inside, seen = (np.linalg.norm(delta @ axes.T, axis=-1) for axes in (self.axes, self.seen_axes))
        return np.linalg.norm(delta, axis=-1), inside, seen


def linear_bound(
    weights: ArrayLike, states: ArrayLike, *, variance: float = 1.0, axes: PrincipalAxes | None = None
) -> LinearBound:
    """The constants of ``||W h_i - W h_j|| <= ||W Pi_r|| ||h_i - h_j||`` and of its converse.

    ``Pi_r`` is the projection on the principal subspace of the centred states that holds ``variance`` of theirs. With
    all of it (1.0) both directions hold for any two of these states:

    - above: ``||W delta|| <= ||W Pi_r|| ||delta||``, ``delta = h_i - h_j``;
    - below: ``||W delta|| >= sigma_min+(W Pi_r) ||delta_seen||``, ``delta_seen`` the projection of ``delta`` on the
      row space of ``W Pi_r``. There is no bound by all of ``delta``: with more dimensions than experts, states can
      differ without moving any logit.

    With less than all, ``||W delta|| <= ||W Pi_r|| ||Pi_r delta|| + ||W (I - Pi_r)|| ||(I - Pi_r) delta||``.

    Args:
        weights: ``[expert, d]``; a bias cancels in the difference.
        states: ``[token, d]``.
        variance: Share of the centred states' variance that the principal subspace holds, above 0.
        axes: :func:`.arrays.principal_axes` of the same states, where they are known.

    Raises:
        DataError: shapes that do not fit, values that are not finite, states without variance.
        ConfigError: ``variance`` not above 0, or above 1.

    Source: "The Myth of Expert Specialization in MoEs" for the bound above; the converse is derived. What it does not
    show: that close logits choose the same experts; at a margin of 0 the smallest difference changes a route.
    """
    check_share(variance, "variance", "Take 1.0, or 0.99.")
    weight, state = weights_and_states(weights, states)
    _, singular, directions = axes or principal_axes(state)
    rank = len(directions)
    if variance < 1:
        held = np.cumsum(singular**2) / (singular**2).sum()
        rank = int(np.searchsorted(held, variance - 1e-12)) + 1
    inside, outside = directions[:rank], directions[rank:]
    _, gain, seen = np.linalg.svd(weight @ inside.T, full_matrices=False)
    is_seen = gain > np.finfo(np.float64).eps * max(weight.shape) * gain[0]
    is_seen &= gain > 0
    return LinearBound(
        upper=float(gain[0]),
        lower=float(gain[is_seen][-1]) if is_seen.any() else 0.0,
        remainder=float(np.linalg.norm(weight @ outside.T, 2)) if len(outside) else 0.0,
        rank=rank,
        seen_rank=int(is_seen.sum()),
        axes=inside,
        seen_axes=seen[is_seen] @ inside,
    )
