"""Do similar states route alike: route similarity against hidden-state similarity, and how much of it is geometry."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from moe_interp.experiments.geometry.nulls import random_routes, top_sets, whitened
from moe_interp.experiments.geometry.pairs import (
    Pairs,
    chosen_sequences,
    cosine_matrix,
    kept_counts,
    overlaps,
    pair_cosines,
    sequence_pairs,
    token_pairs,
    usage_similarity,
)
from moe_interp.experiments.geometry.states import BoolArray, RoutedStates
from moe_interp.stats import MantelResult, derive_rng, mantel, pair_interval
from moe_interp.stats.checks import FloatArray
from moe_interp.stats.geometry.arrays import PrincipalAxes
from moe_interp.stats.geometry.explained import common_share, explained_share
from moe_interp.stats.geometry.pairs import correlation_of_sums

LEVELS = ("token", "sequence")
SOURCES = ("router", "random router", "whitened states")
MOST_SEQUENCES, MOST_TOKENS = 256, 256  # of a Mantel test


def correlations(
    routed: RoutedStates, max_pairs: int, n_permutations: int, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Variables ``[level, layer]`` of the correlation of route and state similarity with its tests, and attributes.

    Token level: ``|S_i n S_j| / k`` against the cosine of router inputs. Sequence level: cosine of expert counts
    against the cosine of mean router inputs.
    """
    by_level = [_token_level(routed, max_pairs, n_permutations, seed), _sequence_level(routed, n_permutations, seed)]
    axes = ("level", "layer")
    variables: dict[str, Any] = {}
    for name in ("correlation", "low", "high"):
        label = "correlation" if name == "correlation" else f"correlation_{name}"
        variables[label] = (axes, np.stack([found[name] for found, _ in by_level]))
    for name in ("p_value", "null_mean", "null_sd"):
        variables[f"mantel_{name}".replace("p_value", "p")] = (
            axes,
            np.stack([getattr(test, name) for _, test in by_level]),
        )
    means = np.array([found["mean"] for found, _ in by_level])
    for place, name in enumerate(("mean_correlation", "mean_correlation_low", "mean_correlation_high")):
        variables[name] = ("level", means[:, place])
    variables["mean_mantel_p"] = ("level", [test.mean_p for _, test in by_level])
    variables["route_agreement"] = (("layer", "other_layer"), _agreement(routed, seed))
    return variables, {"n_permutations": by_level[0][1].n_permutations}


def _interval(x: FloatArray, y: FloatArray, pairs: Pairs, n: int) -> dict[str, Any]:
    """The correlation over pairs ``[layer, pair]`` with its interval over sequences, by layer and averaged."""
    sums = [x, y, x * x, y * y, x * y]
    found = pair_interval(sums, pairs.first_unit, pairs.second_unit, correlation_of_sums, n_units=n, bounds=(-1, 1))

    def mean(*totals: FloatArray) -> FloatArray:
        with np.errstate(invalid="ignore"):
            values = correlation_of_sums(*totals)
        known = ~np.isnan(values)
        return np.where(known.any(-1), np.where(known, values, 0).sum(-1) / np.maximum(known.sum(-1), 1), np.nan)

    whole = pair_interval(sums, pairs.first_unit, pairs.second_unit, mean, n_units=n, bounds=(-1, 1))
    return {
        "correlation": found.estimate,
        "low": found.low,
        "high": found.high,
        "mean": (float(whole.estimate), float(whole.low), float(whole.high)),
    }


def _token_level(
    routed: RoutedStates, max_pairs: int, n_permutations: int, seed: int
) -> tuple[dict[str, Any], MantelResult]:
    pairs, layers = token_pairs(routed, max_pairs, seed), range(len(routed.trace.layers))
    routes = np.stack([overlaps(routed.sets(layer), pairs) for layer in layers])
    hidden = np.stack([pair_cosines(routed.states[:, layer], pairs) for layer in layers])
    chosen, each = _tokens_of_test(routed, seed)
    alike, near = [], []
    for layer in layers:
        sets = routed.sets(layer)[chosen].astype(np.float64)
        alike.append(sets @ sets.T / np.sqrt(np.outer(sets.sum(1), sets.sum(1))))
        near.append(cosine_matrix(routed.states[chosen, layer]))
    test = mantel(np.stack(alike), np.stack(near), tokens_per_unit=each, n_permutations=n_permutations, seed=seed)
    return _interval(routes, hidden, pairs, routed.n_sequences), test


def _tokens_of_test(routed: RoutedStates, seed: int) -> tuple[Any, int]:
    """Kept tokens for the permutation of whole sequences: equally many of each, one sequence after the other."""
    sequences = chosen_sequences(routed.n_sequences, MOST_SEQUENCES, seed)
    of_sequence = [np.flatnonzero(routed.sequence == s) for s in sequences]
    each = max(1, min(min(map(len, of_sequence)), MOST_TOKENS // len(sequences)))
    rng = derive_rng(seed, "tokens of the permutation test")
    return np.concatenate([np.sort(rng.choice(tokens, each, replace=False)) for tokens in of_sequence]), each


def _sequence_level(routed: RoutedStates, n_permutations: int, seed: int) -> tuple[dict[str, Any], MantelResult]:
    chosen = chosen_sequences(routed.n_sequences, MOST_SEQUENCES, seed)
    counts = routed.counts()[chosen]
    layers = range(len(routed.trace.layers))
    alike = np.stack([usage_similarity(counts[:, layer]) for layer in layers])
    near = np.stack([cosine_matrix(routed.pooled[chosen, layer]) for layer in layers])
    test = mantel(alike, near, n_permutations=n_permutations, seed=seed)
    pairs = sequence_pairs(len(chosen), len(chosen), seed)
    at = (slice(None), pairs.first, pairs.second)
    return _interval(alike[at], near[at], pairs, len(chosen)), test


def _agreement(routed: RoutedStates, seed: int) -> FloatArray:
    """``[layer, other_layer]``: correlation over pairs of sequences of their route similarity at two layers."""
    chosen = chosen_sequences(routed.n_sequences, MOST_SEQUENCES, seed)
    counts = routed.counts()[chosen]
    pairs = sequence_pairs(len(chosen), len(chosen), seed)
    rows = np.stack([usage_similarity(counts[:, i])[pairs.first, pairs.second] for i in range(counts.shape[1])])
    centred = rows - rows.mean(1, keepdims=True)
    length = np.sqrt((centred**2).sum(1))
    scale = np.outer(length, length)
    return np.where(scale > 0, centred @ centred.T / np.where(scale > 0, scale, 1), np.nan)


def explained(
    routed: RoutedStates, layer: int, axes: PrincipalAxes, pairs: Pairs, n_random: int, seed: int
) -> dict[str, FloatArray]:
    """``[level, source]`` shares of route similarity at a layer, with intervals, and ``[level]`` random routers' own.

    Both levels use the kept tokens: the routes that were taken, and those that a map of the same states gives. The
    router's own map takes its bias; random routers read centred states, since one that reads the shared direction sends
    every token the same way.
    """
    states = routed.states[:, layer].astype(np.float64)
    sets, width = routed.sets(layer), routed.sets(layer).sum(1)
    own = None
    if routed.weights is not None and routed.bias is not None:
        own = top_sets(states @ routed.weights[layer].T + routed.bias[layer], width)
    rng = derive_rng(seed, "random routers", routed.trace.layers[layer])
    inputs = {"random router": states - axes[0], "whitened states": whitened(states, axes)}
    drawn = {
        name: [random_routes(value, routed.trace.n_experts, width, rng) for _ in range(n_random)]
        for name, value in inputs.items()
    }
    whole = sequence_pairs(routed.n_sequences, MOST_SEQUENCES, seed)
    found = np.full((3, len(LEVELS), len(SOURCES)), np.nan)
    common = np.full(len(LEVELS), np.nan)
    for number, level in enumerate(LEVELS):
        compared = pairs if level == "token" else whole

        def similarity(one: BoolArray, level: str = level, compared: Pairs = compared) -> FloatArray:
            if level == "token":
                return overlaps(one, compared)
            return usage_similarity(kept_counts(routed, one))[compared.first, compared.second]

        taken = similarity(sets)
        for place, name in enumerate(SOURCES):
            if name == "router":
                predicted = None if own is None else similarity(own)
            else:
                each = np.stack([similarity(one) for one in drawn[name]])
                predicted = each.mean(0)
                if name == "random router":
                    common[number] = common_share(each)
            if predicted is not None:
                share = explained_share(
                    taken, predicted, compared.first_unit, compared.second_unit, n_units=routed.n_sequences
                )
                found[:, number, place] = float(share.estimate), float(share.low), float(share.high)
    return {
        "explained": found[0],
        "explained_low": found[1],
        "explained_high": found[2],
        "explained_of_random": common,
    }


def axes_of(routed: RoutedStates) -> dict[str, Any]:
    """Coordinates of layers, levels and sources."""
    layers = list(routed.trace.layers)
    return {"layer": layers, "other_layer": layers, "level": list(LEVELS), "source": list(SOURCES)}


def similarity_dataset(routed: RoutedStates, max_pairs: int, n_permutations: int, seed: int) -> xr.Dataset:
    """Correlations and tests alone, as a dataset."""
    variables, attrs = correlations(routed, max_pairs, n_permutations, seed)
    coords = {name: value for name, value in axes_of(routed).items() if name != "source"}
    return xr.Dataset(variables, coords=coords, attrs=attrs | {"n_sequences": routed.n_sequences})
