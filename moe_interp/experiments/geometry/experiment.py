"""The geometry of a model's routing: everything of "The Myth of Expert Specialization in MoEs", measured at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from moe_interp.checks import check_whole
from moe_interp.engine import threads_asleep
from moe_interp.engine.eval_mode import in_eval_mode
from moe_interp.engine.memory import out_of_memory_in_words
from moe_interp.errors import ConfigError
from moe_interp.experiments.geometry.contexts import generated, phase_overlap, same_token
from moe_interp.experiments.geometry.linear import QUANTILES, bound, shared, suppression
from moe_interp.experiments.geometry.matching import Matching, check_matching, layer_overlap, layer_overlap_of
from moe_interp.experiments.geometry.measures import AXES, Source, check_variance, routed_states
from moe_interp.experiments.geometry.overlap import answer_overlap, depth_variables
from moe_interp.experiments.geometry.pairs import Pairs, check_sequences, token_pairs
from moe_interp.experiments.geometry.result import GeometryResult
from moe_interp.experiments.geometry.similarity import axes_of, correlations, explained
from moe_interp.experiments.geometry.states import RoutedStates, check_trace, own_tokens, with_layers
from moe_interp.hooks.attach import MoEHooks
from moe_interp.progress import Report, reporting
from moe_interp.results import checksum
from moe_interp.stats.checks import check_share
from moe_interp.stats.geometry.arrays import principal_axes
from moe_interp.traces import RoutingTrace


@out_of_memory_in_words()
@threads_asleep()
@in_eval_mode
def measure(
    moe: Source,
    sequences: Sequence[Any] | None = None,
    *,
    other: RoutingTrace | None = None,
    matching: Matching = "usage",
    generate: int | None = None,
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
    :func:`shared_direction` and :func:`depth_overlap`; the same token across contexts; prefill against generation with
    ``generate``, or where a trace has phases; :func:`layer_overlap`; and with ``other`` :func:`answer_overlap`. The
    docstring of each has its formula.

    Args:
        moe: Attached hooks of a causal decoder; or a trace with router inputs, beside ``weights``.
        sequences: At least 3 different ones, of a model: texts, lists of ids, items, or mappings; see
            :func:`moe_interp.experiments.inputs.sequences.read_sequences`. With a ``domain`` each, overlap by depth is
            of different domains. Sequences of the same tokens count once, with a warning.
        other: A second model's trace of the same sequences, in the same order.
        matching: Which expert of ``other`` is compared with which: "usage", "rank" or "identity".
        generate: Of a model: generate so many tokens after each prompt, greedily, and compare the experts of prompt and
            generation. Of prompt and answer, the prompt is read; a text is a prompt as a whole. ``store`` does not keep
            what is generated.
        weights, biases: Of a trace: the routers' linear maps ``[expert, d]`` and biases ``[expert]`` by layer, as
            :func:`router_weights` gives them. Without them there is no bound, no shared direction, and nothing is
            explained by the router itself.
        layers: All by default; layers that choose by token id are then left out, with a warning.
        p: Share of a sequence's slots that a set holds.
        max_tokens: Tokens whose router inputs are kept, over all sequences; memory is tokens x layers x d_model x 4
            bytes, and as much again for each layer at work.
        max_pairs: Pairs of tokens that are compared.
        n_permutations, n_random_routers, n_random_directions: Draws of the nulls.
        n_components: Principal axes whose gain is given beside that of the shared direction.
        memory_budget: Bytes a forward pass may use; by default what is free (on a processor half of it).
        store: Folder for finished batches: an interrupted run goes on from there.
        seed: Of all draws.
        progress: See :func:`moe_interp.progress.reporting`.

    Raises:
        DataError: fewer than 3 sequences, one that is the beginning of another, states without variance, or a trace
            without router inputs.
        ConfigError: an encoder-decoder, a router whose logits are no linear map of what it reads (a named hash layer),
            or options out of range.
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
    check_share(p, "p")
    if other is not None:
        check_trace(other, "other")
    if generate is not None:
        check_whole(generate, "generate", 1)
        if not isinstance(moe, MoEHooks):
            raise ConfigError("generate without a model", "attached hooks", "A trace brings its own phases.")
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
    check_variance(routed)
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
    phases = routed.trace
    if generate is not None:
        assert isinstance(moe, MoEHooks)
        assert sequences is not None
        layers_run = routed.trace.layers
        phases = generated(
            moe, sequences, generate, layers_run, seed=seed, memory_budget=memory_budget, progress=progress
        )
    data = data.assign(phase_overlap(phases, p) or {})
    if other is not None:
        data = data.assign(_of_other(routed, other, matching, p, seed))
        data.attrs["answer_matching"] = matching
    content = checksum([routed.trace.token_ids, routed.trace.sequence_lengths])
    config = options | {
        "generate": generate,
        "layers": list(routed.trace.layers),
        "matching": matching if other is not None else None,
    }
    return GeometryResult(data, config=config, seeds=seed, data_checksum=content)


def _of_layer(routed: RoutedStates, layer: int, pairs: Pairs, options: dict[str, Any], seed: int) -> dict[str, Any]:
    """The measures of one layer."""
    axes = principal_axes(routed.states[:, layer].astype(np.float64))
    found: dict[str, Any] = dict(explained(routed, layer, axes, pairs, options["n_random_routers"], seed))
    if routed.weights is not None:
        found |= bound(routed, layer, axes, pairs)
        found |= shared(routed, layer, axes, options["n_random_directions"], options["n_components"], seed)
    return found


def _dataset(
    routed: RoutedStates, pairs: Pairs, by_layer: list[dict[str, Any]], options: dict[str, Any], seed: int
) -> xr.Dataset:
    variables: dict[str, Any] = {
        name: (AXES.get(name, ("layer",)), np.stack([np.asarray(found[name]) for found in by_layer]))
        for name in by_layer[0]
    }
    similar, attrs = correlations(routed, options["max_pairs"], options["n_permutations"], seed)
    depth, depth_attrs = depth_variables(routed.counts(), _labels(routed), options["p"], True, 20, seed)
    variables |= similar | depth
    if routed.weights is not None:
        variables |= suppression(routed)
    variables |= same_token(routed.trace, routed.is_own, options["max_pairs"], seed) or {}
    layer_pairs = layer_overlap_of(routed.counts(), None, "usage", options["p"], seed)
    variables |= {f"layer_{name}": (("layer", "other_layer"), values) for name, values in layer_pairs.items()}
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


def _of_other(routed: RoutedStates, other: RoutingTrace, matching: Matching, p: float, seed: int) -> dict[str, Any]:
    """Overlap with another model's trace, of the layers that are measured and without tokens that sequences share."""
    if set(routed.trace.layers) < set(other.layers):
        other = with_layers(other, routed.trace.layers)
    mine = routed.trace.select(routed.is_own)
    if other.token_ids is not None and len(other.sequence_lengths) == routed.n_sequences:
        other = other.select(own_tokens(other))
    found = answer_overlap(mine, other, matching, p=p, seed=seed)
    layers = layer_overlap(mine, other, matching, p=p, seed=seed)
    variables = {f"answer_{name}": value for name, value in found.data_vars.items()}
    return variables | {f"answer_layer_{name}": value for name, value in layers.data_vars.items()}


def _labels(routed: RoutedStates) -> Any:
    """Domains, where there are at least two."""
    domains = routed.domains()
    return None if domains is None or len(set(domains.tolist())) < 2 else domains
