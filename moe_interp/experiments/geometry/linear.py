"""What a layer's linear map makes of its states: the bound and how tight it is, and the shared direction."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_interp import stats
from moe_interp.errors import DataError
from moe_interp.experiments.geometry.pairs import Pairs, check_sequences, differences, overlaps, pair_cosines, starts
from moe_interp.experiments.geometry.states import RoutedStates
from moe_interp.stats.checks import FloatArray
from moe_interp.stats.geometry.arrays import PrincipalAxes
from moe_interp.stats.geometry.shared_direction import centred_logits, gains

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
ROUNDING = 1e-9  # of float64, over the products of a pair
DRAWN_PAIRS = 600  # kept for the scatter


def bound(routed: RoutedStates, layer: int, axes: PrincipalAxes, pairs: Pairs) -> dict[str, Any]:
    """Both constants at a layer, and how much of each bound the pairs use, in float64.

    ``tightness`` is ``||W delta|| / (||W Pi|| ||delta||)``, ``converse_tightness`` is ``sigma_min+ ||delta_seen|| /
    ||W delta||``; both from 0 to 1. ``seen_share`` is ``||delta_seen||^2 / ||delta||^2``, ``even_gain`` the root mean
    square of ``||W u||`` over directions u of the states' subspace.
    """
    assert routed.weights is not None
    states, weights = routed.states[:, layer].astype(np.float64), routed.weights[layer]
    found = stats.linear_bound(weights, states, axes=axes)
    length, moved, seen = np.empty((3, len(pairs.first)))
    for start in starts(len(pairs.first)):
        delta = differences(states, pairs, start)
        part = slice(start, start + len(delta))
        moved[part] = np.linalg.norm(delta @ weights.T, axis=1)
        length[part], _, seen[part] = found.distances(delta)
    with np.errstate(divide="ignore", invalid="ignore"):
        above, below = moved / (found.upper * length), found.lower * seen / moved
        share = (seen / length) ** 2
    rounding = ROUNDING * found.upper * length
    shown = slice(None, DRAWN_PAIRS)
    return {
        "bound_upper": found.upper,
        "bound_lower": found.lower,
        "even_gain": float(np.linalg.norm(weights @ found.axes.T) / np.sqrt(found.rank)),
        "bound_rank": found.rank,
        "seen_rank": found.seen_rank,
        "violations": int((moved > found.upper * length + rounding).sum()),
        "converse_violations": int((moved < found.lower * seen - rounding).sum()),
        "tightness": _quantiles(above),
        "converse_tightness": _quantiles(below),
        "seen_share": _quantiles(share),
        "pair_distance": length[shown],
        "pair_logit_distance": moved[shown],
        "pair_cosine": pair_cosines(routed.states[:, layer], _cut(pairs, shown)),
        "pair_overlap": overlaps(routed.sets(layer), _cut(pairs, shown)),
    }


def _cut(pairs: Pairs, part: slice) -> Pairs:
    return Pairs(pairs.first[part], pairs.second[part], pairs.first_unit[part], pairs.second_unit[part])


def _quantiles(values: FloatArray) -> FloatArray:
    """NaN (two equal states) is left out."""
    known = values[np.isfinite(values)]
    return np.quantile(known, QUANTILES) if len(known) else np.full(len(QUANTILES), np.nan)


def shared(
    routed: RoutedStates, layer: int, axes: PrincipalAxes, n_random: int, n_components: int, seed: int
) -> dict[str, Any]:
    """The gain along the shared direction of a layer, and its controls, of the kept tokens."""
    assert routed.weights is not None
    found = stats.shared_direction(
        routed.weights[layer],
        routed.states[:, layer],
        n_random=n_random,
        n_components=n_components,
        seed=seed,
        axes=axes,
    )
    components = np.full((2, n_components), np.nan)
    components[:, : len(found.component)] = found.component, found.component_variance
    return {
        "shared_gain": found.gain,
        "mean_norm": found.mean_norm,
        "random_gain": found.random_gain,
        "random_low": float(np.quantile(found.random, 0.025)),
        "random_high": float(np.quantile(found.random, 0.975)),
        "component_gain": components[0],
        "component_variance": components[1],
        "centred_gain": found.centred_gain,
        "centred_rms": found.centred_rms,
        "shared_p": found.p_suppressed,
    }


def suppression(routed: RoutedStates) -> dict[str, Any]:
    """``log(||Pi_e W mu_hat|| / random gain)`` with its interval over sequences, by layer and averaged over layers.

    Below 0: the router reads the direction that its inputs share less than a random one. ``mu`` is the mean over all
    own tokens of all sequences.
    """
    assert routed.weights is not None
    check_sequences(routed.n_sequences, 2, "the interval")
    sizes = np.bincount(routed.trace.sequence[routed.is_own], minlength=routed.n_sequences).astype(np.float64)
    values, without = [], []
    for layer in range(len(routed.trace.layers)):
        weights = centred_logits(routed.weights[layer])
        sums = routed.pooled[:, layer] * sizes[:, None]
        total = sums.sum(0)
        at_random = np.linalg.norm(weights) / np.sqrt(weights.shape[1])
        with np.errstate(divide="ignore", invalid="ignore"):
            values.append(np.log(gains(weights, total[None]) / at_random)[0])
            without.append(np.log(gains(weights, total - sums) / at_random))
    rows, left = np.array(values), np.stack(without)
    if not np.isfinite(rows).all():
        layer = routed.trace.layers[int(np.argmax(~np.isfinite(rows)))]
        raise DataError(
            f"a router of layer {layer} that does not read the mean of its inputs at all, or is 0",
            "a gain above 0",
            "Leave the layer out.",
        )
    by_layer = stats.jackknife_interval(rows, left)
    whole = stats.jackknife_interval(rows.mean(), left.mean(0))
    return {
        "suppression": ("layer", by_layer.estimate),
        "suppression_low": ("layer", by_layer.low),
        "suppression_high": ("layer", by_layer.high),
        "mean_suppression": ("bound", [float(whole.estimate), float(whole.low), float(whole.high)]),
    }
