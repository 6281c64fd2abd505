"""Routes of another run, read from a cache or from a ``RoutingTrace``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from moe_interp.errors import ConfigError, RouteError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.find_layers import find_layers
from moe_interp.hooks.layer import plain_label
from moe_interp.interventions.positions import TokenSelection, pack_routes
from moe_interp.slots import NATIVE
from moe_interp.types import Layer

# not TransformerLens' flat `blocks.1.mlp.hook_expert_indices`
_OUR_HOOK = re.compile(r"(encoder_|decoder_)?blocks\.\d+\.hook_expert_indices")


class Routes(Protocol):
    """What of a ``RoutingTrace`` is replayed: arrays ``[token, layer, slot]``, sequences one after the other."""

    expert_indices: Any
    expert_weights: Any
    sequence: Any
    layers: tuple[Any, ...]
    n_experts: int


# [sequence, pos, slot] each; indices are OUTSIDE beyond a sequence's end, NATIVE where a trace covers no token
Recorded = dict[Layer, tuple[Tensor, Tensor | None]]
Place = Callable[[Tensor], tuple[Tensor, Tensor]]
OUTSIDE = -3


def is_cache(trace: Any) -> bool:
    """Whether routes come by the hooks' names rather than as a ``RoutingTrace``."""
    return not hasattr(trace, "expert_indices")


def recorded_routes(moe: MoEHooks, trace: Any, layers: Any) -> Recorded:
    """The routes of a cache or a ``RoutingTrace`` by layer, and their weights where they were recorded.

    Raises:
        RouteError: nothing recorded at a layer, recorded layers that are none of the attached MoE layers or that look
            like the MoE layers counted from 0, or routes of another model.
        ConfigError: ``layers`` of another kind.
    """
    chosen = _chosen(moe, layers)
    if is_cache(trace) and not (hasattr(trace, "keys") and hasattr(trace, "__getitem__")):
        raise RouteError(
            f"routes from {str(trace)[:40]!r} of type {type(trace).__name__}",
            "a RoutingTrace, or a cache with expert_indices",
            'Record them with run_with_cache(names_filter=moe.filter("expert_indices", "expert_weights")).',
        )
    return _of_cache(moe, trace, chosen) if is_cache(trace) else _of_trace(moe, trace, chosen)


def _chosen(moe: MoEHooks, layers: Any) -> list[Layer] | Literal["moe"] | None:
    if layers is None:
        return None
    if isinstance(layers, str) and layers == "moe":
        return "moe"
    if isinstance(layers, str) or not isinstance(layers, Iterable) or not (chosen := list(layers)):
        raise ConfigError(f"layers={layers!r}", f'layers among {list(moe.layers)}, or "moe"', "Name the layers.")
    return [moe.layer_label(layer) for layer in chosen]


def _of_cache(moe: MoEHooks, cache: Mapping[str, Tensor], layers: list[Layer] | Literal["moe"] | None) -> Recorded:
    """By the hooks' names, which say the layer."""
    ours = {moe.hook_name("expert_indices", layer) for layer in moe.layers}
    foreign = [name for name in cache if _OUR_HOOK.fullmatch(name) and name not in ours]
    if foreign and not isinstance(layers, list):
        raise RouteError(
            f"routes of {foreign[0]}, which is no attached MoE layer of this model",
            f"routes of {list(moe.layers)}",
            "Replay a run of this model, or name the layers to replay: layers=[...].",
        )
    found: Recorded = {}
    for layer in layers if isinstance(layers, list) else moe.layers:
        name = moe.hook_name("expert_indices", layer)
        if name in cache:
            weights = moe.hook_name("expert_weights", layer)
            found[layer] = pack_routes(_batched(cache, name), _batched(cache, weights) if weights in cache else None)
        elif layers is not None:
            raise _nothing_recorded(layer)
    if not found:
        raise _nothing_recorded(moe.layers[0])
    return found


def _batched(cache: Mapping[str, Tensor], name: str) -> Tensor:
    """A cached activation with its batch axis, also from a cache that dropped it."""
    value = cache[name]
    value = value if getattr(cache, "has_batch_dim", True) else value.unsqueeze(0)
    if value.ndim != 3:
        raise RouteError(
            f"{name} of shape {tuple(value.shape)} in the cache",
            "[batch, pos, slot]",
            "Record whole sequences, without pos_slice.",
        )
    return value


def _of_trace(moe: MoEHooks, trace: Routes, layers: list[Layer] | Literal["moe"] | None) -> Recorded:
    columns = _columns_by_place(moe, trace) if layers == "moe" else _columns_by_label(moe, trace, layers)
    found: Recorded = {}
    for layer, column in columns.items():
        if trace.n_experts != moe.spec(layer).n_experts:
            raise RouteError(
                f"a trace of {trace.n_experts} experts for layer {layer} with {moe.spec(layer).n_experts}",
                "routes of this model",
                "Replay a trace recorded on it.",
            )
        indices = _by_sequence(trace, torch.as_tensor(trace.expert_indices[:, column]).long(), OUTSIDE)
        weights = trace.expert_weights
        weights = None if weights is None else _by_sequence(trace, torch.as_tensor(weights[:, column]), 0.0)
        found[layer] = pack_routes(indices, weights)
    return found


def _columns_by_place(moe: MoEHooks, trace: Routes) -> dict[Layer, int]:
    """Layer -> column, the columns being all MoE layers of the model in their order."""
    every = tuple(find_layers(moe.bridge))
    if len(trace.layers) != len(every):
        raise RouteError(
            f'layers="moe" for a trace of {len(trace.layers)} columns and a model with {len(every)} MoE layers',
            f"one column for each of {list(every)}",
            "Label the trace's columns, RoutingTrace.from_arrays(..., layers=[...]), and leave this out.",
        )
    if every != moe.layers:
        raise RouteError(
            f'layers="moe" with hooks on {list(moe.layers)} only',
            f"hooks on all MoE layers, {list(every)}",
            "Attach to all, or label the trace's columns and name the layers to replay.",
        )
    return {layer: column for column, layer in enumerate(every)}


def _columns_by_label(moe: MoEHooks, trace: Routes, layers: list[Layer] | None) -> dict[Layer, int]:
    """Layer -> column, by the trace's labels; refused where these may be places instead."""
    labels, every = [plain_label(layer) for layer in trace.layers], tuple(find_layers(moe.bridge))
    unknown = [label for label in labels if label not in every]
    counted = len(labels) == len(every) and labels == list(range(len(labels))) and tuple(labels) != every
    if counted or (layers is None and (unknown or any(label not in moe.layers for label in labels))):
        bad = unknown or [label for label in labels if label not in moe.layers]
        by_place = len(labels) == len(every)
        if not by_place and not set(labels) & set(every):
            raise _nothing_recorded(moe.layers[0])
        raise RouteError(
            f"a trace of layers {_brief(labels)}, of which layer {bad[0]!r} "
            + ("is no MoE layer of this model" if unknown else "is not attached"),
            f"layers among the {'attached ' if not unknown else ''}MoE layers {_brief(moe.layers)}",
            'If its columns are the MoE layers in order, as inference engines record them, pass layers="moe".'
            if by_place and unknown
            else "Name those to replay: layers=[...].",
        )
    for layer in layers or ():
        if layer not in labels:
            raise _nothing_recorded(layer)
    return {layer: labels.index(layer) for layer in (labels if layers is None else layers)}


def _brief(layers: Sequence[Layer]) -> str:
    """All of few layers; the first and the last of many."""
    return str(list(layers)) if len(layers) <= 8 else f"{layers[0]!r} to {layers[-1]!r} ({len(layers)})"


def _by_sequence(trace: Routes, tokens: Tensor, fill: float) -> Tensor:
    """``[token, slot]`` to ``[sequence, pos, slot]``, filled beyond each sequence's end."""
    lengths = torch.bincount(torch.as_tensor(trace.sequence))
    return torch.nn.utils.rnn.pad_sequence(list(tokens.split(lengths.tolist())), batch_first=True, padding_value=fill)


def reader(
    where: TokenSelection, recorded: Tensor, place: Place, name: str, needs_all: bool = False
) -> Callable[[Tensor], Tensor]:
    """A function of a hooked tensor: what was recorded, ``[batch, pos, slot]``, for the tokens of ``where``.

    Args:
        where: The tokens.
        recorded: ``[sequence, pos, slot]``, routes or weights; routes are ``OUTSIDE`` where nothing is.
        place: From the hooked tensor to the recorded sequence and position ``[batch, pos]`` of each token.
        name: The hook, for the error.
        needs_all: Refuse tokens that the trace does not cover, rather than give them ``NATIVE``.
    """

    def read(value: Tensor) -> Tensor:
        tokens, source = where.tokens(value), recorded.to(value.device)
        row, at = place(value)
        outside = tokens & ((at >= source.shape[1]) | (at < 0) | (row >= source.shape[0]))
        new = source[row.clamp(max=source.shape[0] - 1), at.clamp(0, source.shape[1] - 1)]
        if not new.is_floating_point():
            outside |= tokens & (new == OUTSIDE).any(dim=-1)
        if bool(outside.any()):
            b, p = outside.nonzero()[0].tolist()
            n_past = where.moe.pass_context(where.layer).n_past
            raise RouteError(
                f"row {b}, position {p + n_past} at {name}, which the trace does not hold",
                f"at most {source.shape[0]} sequences with recorded positions",
                "Replay on the recorded tokens, or limit `positions`; the model was left as it was.",
            )
        if needs_all and bool((native := tokens & (new == NATIVE).any(dim=-1)).any()):
            raise RouteError(
                f"a route for row {native.nonzero()[0, 0]} at {name} from a token that the trace does not cover",
                "recorded routes at the source's positions",
                "Name other source positions; the model was left as it was.",
            )
        return new

    return read


def columns(where: TokenSelection, value: Tensor) -> Tensor:
    """``[batch, pos]``, the column of each token of the running pass, cached ones counted."""
    n_past, (batch, pos) = where.moe.pass_context(where.layer).n_past, value.shape[:2]
    return torch.arange(n_past, n_past + pos, device=value.device).expand(batch, pos)


def _nothing_recorded(layer: Layer) -> RouteError:
    return RouteError(
        f"no recorded routes for layer {layer!r}",
        "a RoutingTrace, or a cache with expert_indices",
        'Record them with run_with_cache(names_filter=moe.filter("expert_indices", "expert_weights")).',
    )
