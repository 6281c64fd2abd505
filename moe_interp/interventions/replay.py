"""Replay recorded routes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_interp.errors import RouteError
from moe_interp.hooks.attach import MoEHooks, check_attached
from moe_interp.interventions.where import Positions, Where, pack_routes
from moe_interp.interventions.writing import RouteWriter
from moe_interp.types import Hooks, Layer


class Routes(Protocol):
    """What of a ``RoutingTrace`` is replayed: arrays ``[token, layer, slot]``, sequences one after the other."""

    expert_indices: Any
    expert_weights: Any
    sequence: Any
    layers: tuple[Any, ...]
    n_experts: int


def replay_routes(
    moe: MoEHooks,
    trace: Any,
    layers: list[Layer] | None = None,
    positions: Positions = "all",
    attention_mask: Tensor | None = None,
) -> Hooks:
    """Make tokens take the routes of a recorded run. Replaying a run's own routes changes nothing, to the last bit.

    Args:
        moe: Attached hooks.
        trace: A cache with ``expert_indices`` (and ``expert_weights``, if they are to be replayed too), whose rows and
            positions are those of the batch; or a ``RoutingTrace``, whose s-th sequence is for row s of the batch and
            which counts positions from each row's first real token.
        layers: Layers to replay; by default all that were recorded.
        positions, attention_mask: See :class:`moe_interp.interventions.where.Where`; every step by default, so that a
            step of ``generate`` outside the trace is refused. With a cache, both runs have the same padding.

    Raises:
        RouteError: nothing recorded at a layer, routes of another model, or (when it runs) a token outside the trace.
    """
    check_attached(moe)
    from_cache = not hasattr(trace, "expert_indices")
    where = Where(moe, positions, attention_mask)
    recorded = _of_cache(moe, trace, layers) if from_cache else _of_trace(moe, trace, layers)
    hooks: Hooks = []
    for layer, (indices, weights) in recorded.items():
        name = moe.hook_name("expert_indices", layer)
        weigh = None if weights is None else _reader(where, weights, from_cache, name)
        hooks += RouteWriter(moe, layer, where, _reader(where, indices, from_cache, name), weigh).hooks
    return hooks


# [sequence, pos, slot] each; indices are -2 beyond a sequence's end
Recorded = dict[Layer, tuple[Tensor, Tensor | None]]


def _of_cache(moe: MoEHooks, cache: Mapping[str, Tensor], layers: list[Layer] | None) -> Recorded:
    found: Recorded = {}
    for layer in layers or moe.layers:
        name = moe.hook_name("expert_indices", layer)
        if name in cache:
            weights = moe.hook_name("expert_weights", layer)
            found[layer] = pack_routes(_batched(cache, name), _batched(cache, weights) if weights in cache else None)
        elif layers:
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


def _of_trace(moe: MoEHooks, trace: Routes, layers: list[Layer] | None) -> Recorded:
    chosen = [layer for layer in trace.layers if layer in moe.layers] if layers is None else layers
    found: Recorded = {}
    for layer in chosen:
        if layer not in trace.layers:
            raise _nothing_recorded(layer)
        if trace.n_experts != moe.spec(layer).n_experts:
            raise RouteError(
                f"a trace of {trace.n_experts} experts for layer {layer} with {moe.spec(layer).n_experts}",
                "routes of this model",
                "Replay a trace recorded on it.",
            )
        column = list(trace.layers).index(layer)
        indices = _by_sequence(trace, torch.as_tensor(trace.expert_indices[:, column]).long(), -2)
        weights = trace.expert_weights
        weights = None if weights is None else _by_sequence(trace, torch.as_tensor(weights[:, column]), 0.0)
        found[layer] = pack_routes(indices, weights)
    if not found:
        raise _nothing_recorded(moe.layers[0])
    return found


def _by_sequence(trace: Routes, tokens: Tensor, fill: float) -> Tensor:
    """``[token, slot]`` to ``[sequence, pos, slot]``, filled beyond each sequence's end."""
    lengths = torch.bincount(torch.as_tensor(trace.sequence))
    return torch.nn.utils.rnn.pad_sequence(list(tokens.split(lengths.tolist())), batch_first=True, padding_value=fill)


def _reader(where: Where, recorded: Tensor, by_column: bool, name: str) -> Callable[[Tensor], Tensor]:
    def read(value: Tensor) -> Tensor:
        tokens = where.tokens(value)
        batch, pos = value.shape[:2]
        raw = torch.arange(where.moe.n_past, where.moe.n_past + pos, device=value.device).expand(batch, pos)
        at = raw if by_column else where.index(value)
        source = recorded.to(value.device)
        row = torch.arange(batch, device=value.device).unsqueeze(1).expand(batch, pos)
        outside = tokens & ((at >= source.shape[1]) | (row >= source.shape[0]))
        at, row = at.clamp(0, source.shape[1] - 1), row.clamp(max=source.shape[0] - 1)
        new = source[row, at]
        outside |= tokens & (new == -2).any(dim=-1)
        if bool(outside.any()):
            b, p = outside.nonzero()[0].tolist()
            raise RouteError(
                f"row {b}, position {p + where.moe.n_past} at {name}, which the trace does not hold",
                f"at most {source.shape[0]} sequences with recorded positions",
                "Replay on the recorded tokens, or limit `positions`; the model was left as it was.",
            )
        return new

    return read


def _nothing_recorded(layer: Layer) -> RouteError:
    return RouteError(
        f"no recorded routes for layer {layer!r}",
        "a RoutingTrace, or a cache with expert_indices",
        'Record them with run_with_cache(names_filter=moe.filter("expert_indices", "expert_weights")).',
    )
