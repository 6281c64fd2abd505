"""Routes with what the routers read: of a trace that holds router inputs, or recorded from a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_interp.checks import check_whole
from moe_interp.errors import ConfigError, DataError
from moe_interp.experiments.inputs.repeats import merge_repeats
from moe_interp.stats import derive_rng
from moe_interp.stats.checks import FloatArray, real_numbers
from moe_interp.traces import RoutingTrace

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Matrices = Mapping[int, Any]


@dataclass(frozen=True, eq=False)
class RoutedStates:
    """Routes of all tokens, and the routers' inputs of some of them.

    Attributes:
        trace: The routes.
        is_own: ``[token]``, False where another sequence has the same token after the same tokens (a BOS, a shared
            system prompt): it is one observation, not several. Also where a token has no expert at some layer.
        names: ``[sequence]``.
        pooled: ``[sequence, layer, d]``, the mean router input over a sequence's own tokens.
        kept: ``[kept]``, which tokens' inputs are kept: own ones, about equally many of every sequence.
        states: ``[kept, layer, d]``, what the routers' linear maps read.
        weights: ``[layer, expert, d]``, these maps; None where they are not known.
        bias: ``[layer, expert]``, zeros where a router has none.
        model: What the model is called.
    """

    trace: RoutingTrace
    is_own: BoolArray
    names: tuple[str, ...]
    pooled: FloatArray
    kept: IntArray
    states: NDArray[Any]
    weights: FloatArray | None = None
    bias: FloatArray | None = None
    model: str = ""

    @property
    def n_sequences(self) -> int:
        return len(self.names)

    @property
    def sequence(self) -> IntArray:
        """``[kept]`` the sequence of each kept token."""
        return self.trace.sequence[self.kept]

    def sets(self, layer: int) -> BoolArray:
        """``[kept, expert]``: which experts serve each kept token at a layer, counted from 0."""
        return membership(self.trace.expert_indices[self.kept, layer], self.trace.n_experts)

    def counts(self) -> IntArray:
        """``[sequence, layer, expert]`` slots of own tokens."""
        own = self.trace if self.is_own.all() else self.trace.select(self.is_own)
        return own.counts(own.sequence, self.n_sequences)

    def domains(self) -> NDArray[np.str_] | None:
        """``[sequence]`` the domain of each sequence's first token; None without labels."""
        if self.trace.domain is None:
            return None
        starts = np.searchsorted(self.trace.sequence, np.arange(self.n_sequences))
        return self.trace.domain[starts]


def membership(indices: NDArray[Any], n_experts: int) -> BoolArray:
    """``[token, expert]`` bool of routes ``[token, slot]``; ids below 0 are no expert."""
    sets = np.zeros((len(indices), n_experts + 1), dtype=bool)
    np.put_along_axis(sets, np.where(indices < 0, n_experts, indices).astype(np.int64), True, axis=1)
    return sets[:, :-1]


def has_expert(indices: NDArray[Any]) -> BoolArray:
    """``[token]``: routes ``[token, layer, slot]`` with an expert at every layer."""
    at_layer = np.asarray((indices >= 0).sum(axis=2))
    return np.asarray((at_layer > 0).sum(axis=1) == indices.shape[1])


def own_tokens(trace: RoutingTrace, names: tuple[str, ...] | None = None) -> BoolArray:
    """``[token]``: tokens that have an expert at every layer, and a context that no other sequence has.

    Raises:
        DataError: a sequence has no such token: it is the beginning of another one.
    """
    served = has_expert(trace.expert_indices)
    own = served if trace.token_ids is None else served & ~shared_tokens(trace)
    for flags, lack, expected in (
        (served, "a token that has an expert at every layer", "routes of all layers for a token at least"),
        (own, "a token of its own", "sequences none of which is the beginning of another one"),
    ):
        found = np.bincount(trace.sequence[flags], minlength=len(trace.sequence_lengths))
        if not found.all():
            number = int(np.argmin(found))
            name = repr(names[number]) if names else number
            raise DataError(f"sequence {name} without {lack}", expected, "Leave it out.")
    return own


def shared_tokens(trace: RoutingTrace) -> BoolArray:
    """``[token]``: another sequence has the same tokens up to and with this one."""
    assert trace.token_ids is not None
    shared = np.zeros(trace.n_tokens, dtype=bool)
    starts = np.cumsum(trace.sequence_lengths) - trace.sequence_lengths
    alive = np.arange(len(starts))  # sequences that are as another one so far
    prefix = np.zeros(len(starts), dtype=np.int64)
    for pos in range(int(trace.sequence_lengths.max())):
        alive = alive[trace.sequence_lengths[alive] > pos]
        if not len(alive):
            break
        key = np.stack([prefix[alive], trace.token_ids[starts[alive] + pos]], axis=1)
        _, group, size = np.unique(key, axis=0, return_inverse=True, return_counts=True)
        group = group.reshape(-1)
        prefix[alive] = group
        alive = alive[size[group] > 1]
        shared[starts[alive] + pos] = True
    return shared


def tokens_to_keep(trace: RoutingTrace, is_own: BoolArray, most: int, seed: int) -> IntArray:
    """Tokens whose states are kept: as many of each sequence as ``most`` allows, at least one, drawn with the seed."""
    n = len(trace.sequence_lengths)
    each = max(1, most // n)
    rng = derive_rng(seed, "kept tokens")
    order = rng.permutation(trace.n_tokens)
    order = order[is_own[order]]
    order = order[np.argsort(trace.sequence[order], kind="stable")]
    first = np.searchsorted(trace.sequence[order], np.arange(n))
    rank = np.arange(len(order)) - first[trace.sequence[order]]
    return np.sort(order[rank < each])


def states_of_trace(
    trace: RoutingTrace,
    weights: Matrices | None,
    biases: Matrices | None,
    layers: Any = None,
    max_tokens: int = 1024,
    seed: int = 0,
    model: str = "a recorded trace",
) -> RoutedStates:
    """The routed states of a trace that holds router inputs.

    Raises:
        DataError: no router inputs, or layers that the trace lacks.
    """
    inputs = trace.router_inputs
    if inputs is None:
        raise DataError(
            "a trace without router inputs",
            "router_inputs [token, layer, d_model]",
            "Record them (capture_routing with router inputs), or pass the attached model and its sequences.",
        )
    if layers is not None:
        trace = with_layers(trace, layers)
    trace, numbers = distinct(trace)
    names = tuple(map(str, numbers))
    own = own_tokens(trace, names)
    inputs = trace.router_inputs
    assert inputs is not None
    if not np.isfinite(inputs[own]).all():
        raise DataError("router inputs that are not finite", "finite numbers", "Record them in bfloat16 or float32.")
    kept = tokens_to_keep(trace, own, max_tokens, seed)
    sums = np.zeros((len(names), *inputs.shape[1:]))
    np.add.at(sums, trace.sequence[own], inputs[own])
    pooled = sums / np.bincount(trace.sequence[own])[:, None, None]
    if weights is None and biases is not None:
        raise ConfigError("biases without weights", "both, or weights alone", "Pass weights= as well.")
    if biases is not None and not isinstance(biases, Mapping):
        raise ConfigError(
            f"biases of type {type(biases).__name__}", "a mapping from layer to array", "Name the layers."
        )
    found = None if weights is None else _by_layer(weights, trace, (trace.n_experts, inputs.shape[2]), "weights")
    bias = None
    if found is not None:
        given = {layer: np.zeros(trace.n_experts) for layer in trace.layers} | {
            layer: value for layer, value in (biases or {}).items() if value is not None
        }
        bias = _by_layer(given, trace, (trace.n_experts,), "biases")
    return RoutedStates(trace, own, names, pooled, kept, inputs[kept], found, bias, model)


def distinct(trace: RoutingTrace) -> tuple[RoutingTrace, list[int]]:
    """The trace with each sequence of tokens once, and the numbers of those that are kept; warns of the others.

    A trace without token ids is taken as it is.
    """
    numbers = list(range(len(trace.sequence_lengths)))
    if trace.token_ids is None:
        return trace, numbers
    ends = np.cumsum(trace.sequence_lengths)[:-1]
    contents = [part.tobytes() for part in np.split(trace.token_ids, ends)]
    kept, merged = merge_repeats(contents, list(map(str, numbers)), "sequences")
    return (trace.select(np.isin(trace.sequence, kept)), kept) if merged else (trace, numbers)


def check_trace(trace: Any, name: str = "trace") -> None:
    """Refuse what is no trace.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(trace, RoutingTrace):
        raise ConfigError(f"{name} of type {type(trace).__name__}", "a RoutingTrace", "Read a file: RoutingTrace.read.")


def covered_counts(trace: RoutingTrace) -> IntArray:
    """``[sequence, layer, expert]`` slots.

    Raises:
        ConfigError: no trace.
        DataError: a sequence of which the trace covers no token at some layer: nothing is known of its experts there.
    """
    check_trace(trace)
    counts = trace.counts(trace.sequence, len(trace.sequence_lengths))
    lacking = np.argwhere(counts.sum(2) == 0)
    if len(lacking):
        number, place = lacking[0].tolist()
        given = f"sequence {number} without an expert at layer {trace.layers[place]}"
        raise DataError(given, "routes of every sequence at every layer", "Leave the sequence or the layer out.")
    return counts


def with_layers(trace: RoutingTrace, layers: Any) -> RoutingTrace:
    """The trace of some layers, one or several.

    Raises:
        ConfigError: layers that are no whole numbers.
        DataError: a layer that the trace lacks.
    """
    several = [layers] if isinstance(layers, str) or not isinstance(layers, Iterable) else layers
    wanted = [check_whole(layer, "layers") for layer in several]
    missing = [layer for layer in wanted if layer not in trace.layers]
    if missing or not wanted or len(set(wanted)) < len(wanted):
        raise DataError(
            f"layers {wanted} of a trace of layers {list(trace.layers)}",
            "layers that it holds, each once",
            "Leave layers out for all of them.",
        )
    places = [trace.layers.index(layer) for layer in wanted]
    fields = ("expert_indices", "expert_weights", "router_logits", "router_inputs", "expert_norms")
    cut = {name: value[:, places] for name in fields if (value := getattr(trace, name)) is not None}
    return replace(trace, **cut, layers=tuple(wanted))


def _by_layer(given: Matrices, trace: RoutingTrace, shape: tuple[int, ...], name: str) -> FloatArray:
    """``[layer, ...]`` of a mapping from layers."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name} of type {type(given).__name__}", "a mapping from layer to array", "Name the layers.")
    missing = [layer for layer in trace.layers if layer not in given]
    if missing:
        raise DataError(f"{name} without layer {missing[0]}", f"layers {list(trace.layers)}", "Pass all of them.")
    arrays = []
    for layer in trace.layers:
        value = given[layer]
        if hasattr(value, "detach"):
            value = value.detach().double().cpu()
        array = real_numbers(value, f"{name} of layer {layer}")
        if array.shape != shape or not (np.abs(array) < 1e100).all():
            raise DataError(
                f"{name} of layer {layer} of shape {array.shape}", f"finite numbers of shape {shape}", "Correct them."
            )
        arrays.append(array)
    return np.stack(arrays)
