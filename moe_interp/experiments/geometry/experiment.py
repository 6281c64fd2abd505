"""The geometry of a model's routing: everything of "The Myth of Expert Specialization in MoEs", measured at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from moe_interp.checks import check_seed, check_whole
from moe_interp.engine import threads_asleep
from moe_interp.engine.eval_mode import in_eval_mode
from moe_interp.engine.memory import out_of_memory_in_words
from moe_interp.engine.pass_inputs import check_budget
from moe_interp.errors import ConfigError, DataError
from moe_interp.experiments.geometry.contexts import phase_overlap, same_token
from moe_interp.experiments.geometry.linear import QUANTILES, bound, shared, suppression
from moe_interp.experiments.geometry.matching import Matching, check_matching
from moe_interp.experiments.geometry.model_pass import record_states
from moe_interp.experiments.geometry.nulls import check_varies
from moe_interp.experiments.geometry.overlap import answer_overlap, depth_variables
from moe_interp.experiments.geometry.pairs import Pairs, check_sequences, token_pairs
from moe_interp.experiments.geometry.result import GeometryResult
from moe_interp.experiments.geometry.similarity import axes_of, correlations, explained, similarity_dataset
from moe_interp.experiments.geometry.states import RoutedStates, states_of_trace
from moe_interp.hooks.attach import MoEHooks
from moe_interp.progress import Report, reporting
from moe_interp.results import checksum
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
        return source
    if isinstance(source, RoutingTrace):
        if sequences is not None:
            raise ConfigError(
                "sequences beside a trace", "one of them", "A trace has its own sequences: leave them out."
            )
        return states_of_trace(source, weights, biases, layers, max_tokens, seed)
    if sequences is None:
        raise ConfigError("a model without sequences", "sequences to run it on", "Pass sequences=[...].")
    if weights is not None or biases is not None:
        raise ConfigError("weights beside a model", "the model's own", "Leave them out.")
    return record_states(source, sequences, layers, max_tokens, check_budget(memory_budget), store, seed, progress)


@out_of_memory_in_words()
@threads_asleep()
@in_eval_mode
def measure(
    moe: Source,
    sequences: Sequence[Any] | None = None,
    *,
    other: RoutingTrace | None = None,
    matching: Matching = "usage",
    weights: Mapping[int, Any] | None = None,
    biases: Mapping[int, Any] | None = None,
    layers: Any = None,
    p: float = 0.8,
    max_tokens: int = 1024,
    max_pairs: int = 4000,
    n_permutations: int = 999,
    n_random_routers: int = 16,
    n_random_directions: int = 999,
    n_components: int = 8,
    memory_budget: int | None = None,
    store: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool | Report | None = None,
) -> GeometryResult:
    """Measure how far a model's routing follows from the geometry of its states.

    Everything of :func:`route_vs_hidden_similarity`, :func:`explained_by_geometry`, :func:`linear_bounds`,
    :func:`shared_direction` and :func:`depth_overlap`; the same token across contexts; prefill against generation where
    a trace has phases; and with ``other`` :func:`answer_overlap`. The docstring of each has its formula.

    Args:
        moe: Attached hooks of a causal decoder; or a trace with router inputs, beside ``weights``.
        sequences: At least 3 different ones, of a model: texts, lists of ids, items, or mappings; see
            :func:`moe_interp.experiments.inputs.sequences.read_sequences`. With a ``domain`` each, overlap by depth is
            of different domains. Sequences of the same tokens count once, with a warning.
        other: A second model's trace of the same sequences, in the same order.
        matching: Which expert of ``other`` is compared with which: "usage", "rank" or "identity".
        weights, biases: Of a trace: the routers' linear maps ``[expert, d]`` and biases ``[expert]`` by layer, as
            :func:`router_weights` gives them. Without them there is no bound, no shared direction, and nothing is
            explained by the router itself.
        layers: All by default; layers that choose by token id are then left out, with a warning.
        p: Share of a sequence's slots that a set holds.
        max_tokens: Tokens whose router inputs are kept, over all sequences; memory is tokens x layers x d_model x 4
            bytes, and as much again for each layer at work.
        max_pairs: Pairs of tokens that are compared.
        n_permutations, n_random_routers, n_random_directions, n_components: Of the nulls.
        memory_budget: Bytes a forward pass may use; by default what is free (on a processor half of it).
        store: Folder for finished batches: an interrupted run goes on from there.
        seed: Of all draws.
        progress: See :func:`moe_interp.progress.reporting`.

    Raises:
        DataError: fewer than 3 sequences, sequences that begin another one, states without variance, or a trace
            without router inputs.
        ConfigError: a router whose logits are no linear map of what it reads (a named hash layer), or options out of
            range.
        ResultError: a store of another run.

    Tokens that another sequence has after the same tokens (a BOS, a shared prompt) are left out throughout: they are
    one observation. States are what the router's linear map reads: where a router norms or scales its input first
    (Gemma 4), those after that.

    Source: "The Myth of Expert Specialization in MoEs"; where a definition is ours, the measure's docstring says
    derived. What it does not show: what experts compute.
    """
    for name, value in (("max_pairs", max_pairs), ("n_permutations", n_permutations)):
        check_whole(value, name, 1)
    for name, value in (("n_random_directions", n_random_directions), ("n_components", n_components)):
        check_whole(value, name, 1)
    check_whole(n_random_routers, "n_random_routers", 2)
    check_matching(matching)
    if not 0 < p <= 1:
        raise ConfigError(f"p={p}", "a share above 0 and at most 1", "Take 0.8.")
    if isinstance(sequences, Sequence) and not isinstance(sequences, str):
        check_sequences(len(sequences), 3, "the permutation test")
    routed = routed_states(
        moe,
        sequences,
        weights=weights,
        biases=biases,
        layers=layers,
        max_tokens=max_tokens,
        memory_budget=memory_budget,
        store=store,
        seed=seed,
        progress=progress,
    )
    check_sequences(routed.n_sequences, 3, "the permutation test")
    _check_variance(routed)
    options = {
        "p": p,
        "max_tokens": max_tokens,
        "max_pairs": max_pairs,
        "n_permutations": n_permutations,
        "n_random_routers": n_random_routers,
        "n_random_directions": n_random_directions,
        "n_components": n_components,
    }
    pairs = token_pairs(routed, max_pairs, seed)
    by_layer = []
    with reporting("measuring the geometry of layers", progress) as report:
        for layer in range(len(routed.trace.layers)):
            report(layer, len(routed.trace.layers))
            by_layer.append(_of_layer(routed, layer, pairs, options, seed))
        report(len(routed.trace.layers), len(routed.trace.layers))
    data = _dataset(routed, pairs, by_layer, options, seed)
    if other is not None:
        found = answer_overlap(routed.trace, other, matching, p=p, seed=seed)
        data = data.assign({f"answer_{name}": value for name, value in found.data_vars.items()})
        data.attrs["answer_matching"] = matching
    content = checksum([routed.trace.token_ids, routed.trace.sequence_lengths])
    config = options | {"layers": list(routed.trace.layers), "matching": matching if other is not None else None}
    return GeometryResult(data, config=config, seeds=seed, data_checksum=content)


def _check_variance(routed: RoutedStates) -> None:
    spread = routed.states.astype(np.float64).std(0)  # [layer, d]
    scale = np.abs(routed.states).max((0, 2))
    check_varies(np.where(spread.max(1) > 1e-12 * scale, spread.max(1), 0.0), routed.trace.layers)


def _of_layer(routed: RoutedStates, layer: int, pairs: Pairs, options: dict[str, Any], seed: int) -> dict[str, Any]:
    """The measures of one layer."""
    axes = principal_axes(routed.states[:, layer].astype(np.float64))
    found: dict[str, Any] = dict(explained(routed, layer, axes, pairs, options["n_random_routers"], seed))
    if routed.weights is not None:
        found |= bound(routed, layer, axes, pairs)
        found |= shared(routed, layer, axes, options["n_random_directions"], options["n_components"], seed)
    return found


_AXES = {
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


def _dataset(
    routed: RoutedStates, pairs: Pairs, by_layer: list[dict[str, Any]], options: dict[str, Any], seed: int
) -> xr.Dataset:
    variables: dict[str, Any] = {
        name: (_AXES.get(name, ("layer",)), np.stack([np.asarray(found[name]) for found in by_layer]))
        for name in by_layer[0]
    }
    similar, attrs = correlations(routed, options["max_pairs"], options["n_permutations"], seed)
    depth, depth_attrs = depth_variables(routed.counts(), _labels(routed), options["p"], True, 20, seed)
    variables |= similar | depth
    if routed.weights is not None:
        variables |= suppression(routed)
    variables |= same_token(routed.trace, routed.is_own, options["max_pairs"], seed) or {}
    variables |= phase_overlap(routed.trace, options["p"], seed) or {}
    variables["counts"] = (("sequence", "layer", "expert"), routed.counts().astype(np.int32))
    coords: dict[str, Any] = axes_of(routed) | {
        "bound": ["estimate", "low", "high"],
        "sequence": list(routed.names),
        "expert": list(range(routed.trace.n_experts)),
    }
    if routed.weights is not None:
        coords |= {"quantile": list(QUANTILES), "component": list(range(1, options["n_components"] + 1))}
    domains = routed.domains()
    if domains is not None:
        coords["domain"] = ("sequence", domains)
    attrs |= {
        "model": routed.model,
        "n_sequences": routed.n_sequences,
        "n_tokens": int(routed.is_own.sum()),
        "n_left_out": int((~routed.is_own).sum()),
        "n_kept": len(routed.kept),
        "n_pairs": len(pairs.first),
        "n_experts": routed.trace.n_experts,
        "n_slots": routed.trace.n_slots,
        "depth_pairs": depth_attrs["pairs"],
        "deep_layers": depth_attrs["deep_layers"],
        "p": options["p"],
        "n_random_routers": options["n_random_routers"],
    }
    return xr.Dataset(variables, coords=coords, attrs=attrs)


def _labels(routed: RoutedStates) -> Any:
    """Domains, where there are at least two."""
    domains = routed.domains()
    return None if domains is None or len(set(domains.tolist())) < 2 else domains


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
        ``mantel_null_mean``, ``mantel_null_sd``; ``[level, bound]``-like means over layers with one joint p. The token
        level's test is of up to 256 tokens, equally many of each sequence, its correlation of ``max_pairs`` pairs.
        ``route_agreement[layer, other_layer]``: the correlation of the route similarities of two layers.

    Raises:
        As :func:`measure`.

    Source: "The Myth of Expert Specialization in MoEs" for route similarity; cosines at the router input and the tests
    are derived. What it does not show: that similarity of states is similarity of meaning.
    """
    routed = routed_states(moe, sequences, layers=layers, max_tokens=max_tokens, seed=seed, **options)
    check_sequences(routed.n_sequences, 3, "the permutation test")
    _check_variance(routed)
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
    alone: 1 where nothing but the linear map decides, less where correction biases, group limits or capacities do; it
    is 1 by construction for a plain linear router, and 0 in expectation for routes that do not depend on the states.
    "random router": routers of independent normal weights on the centred states, averaged: what the geometry of the
    states alone does, whoever routes. "whitened states": the same where all principal axes have one variance: what is
    left once the spread of the states is taken away.

    Returns:
        ``explained[layer, level, source]`` with intervals over sequences (``_low``, ``_high``), and
        ``explained_of_random[layer, level]``: the share that random routers explain of one more of them. A router whose
        share by "random router" is near that routes as any linear map of these states would.

    Raises:
        As :func:`measure`.

    Source: derived; see :func:`moe_interp.stats.geometry.explained.explained_share`. What it does not show: whether the
    states were made by training with this router, as they were.
    """
    routed = routed_states(moe, sequences, seed=seed, **options)
    check_sequences(routed.n_sequences, 2, "the interval")
    _check_variance(routed)
    pairs = token_pairs(routed, max_pairs, seed)
    rows = []
    for layer in range(len(routed.trace.layers)):
        axes = principal_axes(routed.states[:, layer].astype(np.float64))
        rows.append(explained(routed, layer, axes, pairs, check_whole(n_random_routers, "n_random_routers", 2), seed))
    coords = {name: value for name, value in axes_of(routed).items() if name != "other_layer"}
    return xr.Dataset({n: (_AXES[n], np.stack([row[n] for row in rows])) for n in rows[0]}, coords=coords)


def linear_bounds(
    moe: Source, sequences: Sequence[Any] | None = None, *, max_pairs: int = 4000, seed: int = 0, **options: Any
) -> xr.Dataset:
    """Both directions of the bound that a linear router keeps, with the measured constants, by layer.

    As :func:`moe_interp.stats.linear_bound`, of the kept tokens' states, in float64.

    Returns:
        ``bound_upper, bound_lower, bound_rank, seen_rank``; ``tightness`` and ``converse_tightness`` ``[layer,
        quantile]``, the share of each bound that pairs of tokens use; ``violations`` and ``converse_violations``,
        which are 0; and some pairs' ``pair_distance, pair_logit_distance, pair_cosine, pair_overlap``.

    Raises:
        DataError: as :func:`measure`; a trace without weights.
    """
    routed = _with_weights(routed_states(moe, sequences, seed=seed, **options))
    pairs = token_pairs(routed, max_pairs, seed)
    rows = [bound(routed, layer, _axes(routed, layer), pairs) for layer in range(len(routed.trace.layers))]
    variables = {n: (_AXES.get(n, ("layer",)), np.stack([np.asarray(row[n]) for row in rows])) for n in rows[0]}
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
        DataError: as :func:`measure`; a trace without weights.
    """
    routed = _with_weights(routed_states(moe, sequences, seed=seed, **options))
    rows = [
        shared(routed, layer, _axes(routed, layer), n_random_directions, n_components, seed)
        for layer in range(len(routed.trace.layers))
    ]
    variables: dict[str, Any] = {
        n: (_AXES.get(n, ("layer",)), np.stack([np.asarray(row[n]) for row in rows])) for n in rows[0]
    }
    coords = {"layer": list(routed.trace.layers), "component": list(range(1, n_components + 1))}
    return xr.Dataset(variables | suppression(routed), coords=coords | {"bound": ["estimate", "low", "high"]})


def _with_weights(routed: RoutedStates) -> RoutedStates:
    if routed.weights is None:
        raise DataError(
            "a trace without the routers' weights", "weights by layer", "Pass weights=router_weights(moe)[0]."
        )
    _check_variance(routed)
    return routed


def _axes(routed: RoutedStates, layer: int) -> Any:
    return principal_axes(routed.states[:, layer].astype(np.float64))
