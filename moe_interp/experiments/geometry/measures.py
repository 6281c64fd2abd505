"""Each measure of the geometry of routing alone, of an attached model on sequences or of a trace."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from moe_interp.checks import check_seed, check_whole
from moe_interp.engine.pass_inputs import check_budget
from moe_interp.errors import ConfigError, DataError
from moe_interp.experiments.geometry.linear import QUANTILES, bound, shared, suppression
from moe_interp.experiments.geometry.model_pass import record_states
from moe_interp.experiments.geometry.nulls import check_varies
from moe_interp.experiments.geometry.pairs import check_sequences, token_pairs
from moe_interp.experiments.geometry.similarity import axes_of, explained, similarity_dataset
from moe_interp.experiments.geometry.states import RoutedStates, states_of_trace
from moe_interp.hooks.attach import MoEHooks
from moe_interp.progress import Report
from moe_interp.stats.geometry.arrays import principal_axes
from moe_interp.traces import RoutingTrace

Source = MoEHooks | RoutingTrace | RoutedStates


def routed_states(
    source: Source,
    sequences: Sequence[Any] | None = None,
    *,
    weights: Mapping[int, Any] | None = None,
    biases: Mapping[int, Any] | None = None,
    layers: Any = None,
    max_tokens: int = 1024,
    memory_budget: int | None = None,
    store: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool | Report | None = None,
) -> RoutedStates:
    """Routes and router inputs, of an attached model on sequences or of a trace: what every measure takes as well.

    Arguments as those of :func:`measure`.

    Raises:
        ConfigError: a model without sequences, sequences beside a trace, or a source of another kind.
    """
    check_whole(max_tokens, "max_tokens", 1)
    check_seed(seed)
    if isinstance(source, RoutedStates):
        given = (sequences, weights, biases, layers, store)
        if any(value is not None for value in given):
            raise ConfigError("other inputs beside routed states", "the states alone", "They hold what is measured.")
        return source
    if isinstance(source, RoutingTrace):
        if sequences is not None:
            raise ConfigError(
                "sequences beside a trace", "one of them", "A trace has its own sequences: leave them out."
            )
        if store is not None:
            raise ConfigError("a store beside a trace", "a model, whose passes it keeps", "Leave store out.")
        return states_of_trace(source, weights, biases, layers, max_tokens, seed)
    if not isinstance(source, MoEHooks):
        raise ConfigError(
            f"{source!r} of type {type(source).__name__}"[:80],
            "attached hooks, or a trace with router inputs",
            "Pass mi.attach(bridge), or RoutingTrace.read(file).",
        )
    if sequences is None:
        raise ConfigError("a model without sequences", "sequences to run it on", "Pass at least three.")
    if weights is not None or biases is not None:
        raise ConfigError("weights beside a model", "the model's own", "Leave them out.")
    return record_states(source, sequences, layers, max_tokens, check_budget(memory_budget), store, seed, progress)


AXES = {
    "explained": ("layer", "level", "source"),
    "explained_low": ("layer", "level", "source"),
    "explained_high": ("layer", "level", "source"),
    "explained_of_random": ("layer", "level"),
    "tightness": ("layer", "quantile"),
    "converse_tightness": ("layer", "quantile"),
    "seen_share": ("layer", "quantile"),
    "component_gain": ("layer", "component"),
    "component_variance": ("layer", "component"),
    "pair_distance": ("layer", "pair"),
    "pair_logit_distance": ("layer", "pair"),
    "pair_cosine": ("layer", "pair"),
    "pair_overlap": ("layer", "pair"),
}


def check_variance(routed: RoutedStates) -> None:
    spread = routed.states.astype(np.float64).std(0)  # [layer, d]
    scale = np.abs(routed.states).max((0, 2))
    check_varies(np.where(spread.max(1) > 1e-12 * scale, spread.max(1), 0.0), routed.trace.layers)


def route_vs_hidden_similarity(
    moe: Source,
    sequences: Sequence[Any] | None = None,
    *,
    layers: Any = None,
    max_tokens: int = 1024,
    max_pairs: int = 4000,
    n_permutations: int = 999,
    seed: int = 0,
    **options: Any,
) -> xr.Dataset:
    """Do similar states route alike: the correlation of route similarity with hidden-state similarity, by layer.

    Token level: ``|S_i n S_j| / k`` against the cosine of the router inputs, over pairs of tokens of different
    sequences. Sequence level: the cosine of normalised expert counts against the cosine of mean router inputs, over
    pairs of sequences.

    Args:
        moe, sequences, layers, max_tokens, max_pairs, n_permutations, seed, options: As :func:`measure`; ``options``
            are those of :func:`routed_states`.

    Returns:
        ``[level, layer]``: ``correlation`` (Pearson) with its jackknife interval over sequences (``_low``, ``_high``),
        ``mantel_p`` (two-sided, sequences permuted whole, so that tokens of one sequence may depend on each other),
        ``mantel_null_mean``, ``mantel_null_sd``. ``[level]``: ``mean_correlation``, the mean over layers, with its
        interval, and ``mean_mantel_p``, one p for all layers. The token level's test is of up to 256 tokens, equally
        many of each sequence, its correlation of ``max_pairs`` pairs. ``route_agreement[layer, other_layer]``: the
        correlation of the route similarities of two layers.

    Raises:
        As :func:`measure`.

    Source: "The Myth of Expert Specialization in MoEs" for route similarity; cosines at the router input and the tests
    are derived. What it does not show: that similarity of states is similarity of meaning.
    """
    routed = routed_states(moe, sequences, layers=layers, max_tokens=max_tokens, seed=seed, **options)
    check_sequences(routed.n_sequences, 3, "the permutation test")
    check_variance(routed)
    return similarity_dataset(routed, max_pairs, n_permutations, seed)


def explained_by_geometry(
    moe: Source,
    sequences: Sequence[Any] | None = None,
    *,
    n_random_routers: int = 16,
    max_pairs: int = 4000,
    seed: int = 0,
    **options: Any,
) -> xr.Dataset:
    """The share of route similarity that linear maps of the states reproduce: ``cov(s, g) / var(s)`` over pairs.

    ``s`` is the similarity of the routes taken, ``g`` that of the routes that a map gives to the same states, each
    token with as many experts as it has. By ``source``: "router", the router's own weight and bias, ranked by logits
    alone: 1 by construction for a plain linear router, less where correction biases, group limits or capacities decide
    as well, and 0 in expectation for routes that do not depend on the states.
    "random router": routers of independent normal weights on the centred states, averaged: what the geometry of the
    states alone does, whoever routes. "whitened states": the same where all principal axes have one variance: what is
    left once the spread of the states is taken away.

    Returns:
        ``explained[layer, level, source]`` with intervals over sequences (``_low``, ``_high``), and
        ``explained_of_random[layer, level]``: the share that random routers explain of one more of them. A router whose
        share by "random router" is near that routes as any linear map of these states would.

    Raises:
        As :func:`measure`.

    Source: derived; see :func:`moe_interp.stats.geometry.explained.explained_share`. What it does not show: how far the
    states were shaped by training with this router.
    """
    routed = routed_states(moe, sequences, seed=seed, **options)
    check_sequences(routed.n_sequences, 2, "the interval")
    check_variance(routed)
    pairs = token_pairs(routed, max_pairs, seed)
    rows = []
    for layer in range(len(routed.trace.layers)):
        axes = principal_axes(routed.states[:, layer].astype(np.float64))
        rows.append(explained(routed, layer, axes, pairs, check_whole(n_random_routers, "n_random_routers", 2), seed))
    coords = {name: value for name, value in axes_of(routed).items() if name != "other_layer"}
    return xr.Dataset({n: (AXES[n], np.stack([row[n] for row in rows])) for n in rows[0]}, coords=coords)


def linear_bounds(
    moe: Source, sequences: Sequence[Any] | None = None, *, max_pairs: int = 4000, seed: int = 0, **options: Any
) -> xr.Dataset:
    """Both directions of the bound that a linear router keeps, with the measured constants, by layer.

    ``||W delta|| <= upper ||delta||`` and ``||W delta|| >= lower ||delta_seen||``, ``delta`` the difference of two
    states and ``delta_seen`` its part that moves a logit: as :func:`moe_interp.stats.linear_bound`, of the kept tokens'
    states, in float64.

    Returns:
        ``bound_upper, bound_lower`` in logits per unit of state, ``even_gain`` (root mean square over directions of the
        principal subspace), ``bound_rank, seen_rank``; ``tightness`` and ``converse_tightness`` ``[layer,
        quantile]``, the share of each bound that pairs of tokens use; ``seen_share[layer, quantile]``,
        ``||delta_seen||^2 / ||delta||^2``; ``violations`` and ``converse_violations``, which are 0; and some pairs'
        ``pair_distance, pair_logit_distance, pair_cosine, pair_overlap``.

    Raises:
        DataError: as :func:`measure`; a trace without weights.

    Source: "The Myth of Expert Specialization in MoEs" for the bound above; the converse is derived. What it does not
    show: that close logits choose the same experts.
    """
    routed = _with_weights(routed_states(moe, sequences, seed=seed, **options))
    pairs = token_pairs(routed, max_pairs, seed)
    rows = [bound(routed, layer, _axes(routed, layer), pairs) for layer in range(len(routed.trace.layers))]
    variables = {n: (AXES.get(n, ("layer",)), np.stack([np.asarray(row[n]) for row in rows])) for n in rows[0]}
    return xr.Dataset(variables, coords={"layer": list(routed.trace.layers), "quantile": list(QUANTILES)})


def shared_direction(
    moe: Source,
    sequences: Sequence[Any] | None = None,
    *,
    n_random_directions: int = 999,
    n_components: int = 8,
    seed: int = 0,
    **options: Any,
) -> xr.Dataset:
    """How strongly each router reads the direction that all its inputs share, ``||Pi_e W mu_hat||``, with controls.

    As :func:`moe_interp.stats.shared_direction`, of the kept tokens' states.

    Returns:
        By layer: ``shared_gain``; ``random_gain`` (root mean square over all directions; ``random_low`` and
        ``random_high`` hold 95% of them); ``component_gain, component_variance[layer, component]``; ``centred_gain,
        centred_rms, mean_norm, shared_p``; and ``suppression``, the log of ``shared_gain / random_gain`` over all own
        tokens, with its interval over sequences, by layer and averaged (``mean_suppression``).

    Raises:
        DataError: as :func:`measure`; a trace without weights, or a router that does not read the mean at all.

    Source: "The Myth of Expert Specialization in MoEs" for the claim; the controls are derived. What it does not show:
    why the gain is small or large.
    """
    routed = _with_weights(routed_states(moe, sequences, seed=seed, **options))
    rows = [
        shared(routed, layer, _axes(routed, layer), n_random_directions, n_components, seed)
        for layer in range(len(routed.trace.layers))
    ]
    variables: dict[str, Any] = {
        n: (AXES.get(n, ("layer",)), np.stack([np.asarray(row[n]) for row in rows])) for n in rows[0]
    }
    coords = {"layer": list(routed.trace.layers), "component": list(range(1, n_components + 1))}
    return xr.Dataset(variables | suppression(routed), coords=coords | {"bound": ["estimate", "low", "high"]})


def _with_weights(routed: RoutedStates) -> RoutedStates:
    if routed.weights is None:
        raise DataError(
            "a trace without the routers' weights", "weights by layer", "Give those of the model (router_weights)."
        )
    check_variance(routed)
    return routed


def _axes(routed: RoutedStates, layer: int) -> Any:
    return principal_axes(routed.states[:, layer].astype(np.float64))
