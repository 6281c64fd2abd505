"""What scoring is given: tokens, positions, layers and routes, refused where nothing could be scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_interp.engine.pass_inputs import is_integer
from moe_interp.engine.recorded_pass import RecordedPass
from moe_interp.errors import ConfigError, DataError, RouteError
from moe_interp.hooks.attach import MoEHooks, check_attached
from moe_interp.hooks.layer import check_route, plain_label
from moe_interp.routes.branch_scores import LayerRoutes, ruled_routes
from moe_interp.types import Layer


def scorable(real: Tensor, positions: Sequence[int] | Tensor | None = None) -> Tensor:
    """``[batch, pos]`` bool: real tokens with a real next token, among the positions asked.

    Args:
        real: ``[batch, pos]`` bool, False at padding.
        positions: See :func:`moe_interp.routes.score_routes`.

    Raises:
        DataError: there is none, positions that no sequence reaches, or that are neither integers nor a mask.
    """
    wanted = torch.zeros_like(real)
    wanted[:, :-1] = real[:, :-1] & real[:, 1:]
    if positions is not None:
        wanted &= _asked(real, positions)
    if not bool(wanted.any()):
        raise DataError(
            f"no token to score among {int(real.sum())} real tokens"
            + ("" if positions is None else f" and positions {positions}"),
            "at least one real token followed by a real token",
            "Pass longer sequences, or other positions.",
        )
    return wanted


def _asked(real: Tensor, positions: Any) -> Tensor:
    """``[batch, pos]`` bool: the tokens at these positions, which count the real tokens, or from a mask."""
    expected = f"a list of integers, or bool of shape {tuple(real.shape)}"
    try:
        asked = torch.as_tensor(positions, device=real.device)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"positions={positions!r}", expected, "Leave positions out to score every token.") from None
    asked = asked.long() if not asked.numel() else asked
    is_mask = asked.dtype == torch.bool
    if (asked.shape != real.shape) if is_mask else (asked.ndim != 1 or not is_integer(asked)):
        raise DataError(
            f"positions of shape {tuple(asked.shape)} and dtype {asked.dtype}",
            expected,
            "Give the same positions for all sequences, or a mask of the tokens.",
        )
    if is_mask:
        return asked
    index, length = real.long().cumsum(dim=1) - 1, real.long().sum(dim=1, keepdim=True)
    longest = int(length.max())
    beyond = [at for at in asked.tolist() if not -longest <= at < longest]
    if beyond:
        given = f"positions {beyond[:5]}, which no sequence has"
        raise DataError(given, f"positions from {-longest} to {longest - 1}", "Leave them out.")
    asked = torch.where(asked < 0, asked + length, asked.expand(len(real), -1))
    return (index.unsqueeze(-1) == asked.unsqueeze(1)).any(dim=-1)


def check_routes(base: RecordedPass, layer: int, indices: Tensor, weights: Tensor | None = None) -> LayerRoutes:
    """Routes of one layer, with their weights, refused where no token could take them.

    Raises:
        RouteError, DataError: as :func:`checked_experts`.
    """
    return ruled_routes(base, layer, *checked_experts(base.moe, base.tokens, layer, indices, weights))


def checked_experts(
    moe: MoEHooks, tokens: Tensor, layer: int, indices: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Experts of some tokens' routes, and their weights where they are given, on the tokens' device; no pass is run.

    Raises:
        RouteError: another shape, another number of slots, repeated or out-of-range experts, or weights that
            do not fit.
        DataError: no route.
    """
    spec, (batch, pos) = moe.spec(layer), tokens.shape
    given = as_routes(indices, "routes").to(tokens.device)
    if given.ndim == 4 and given.shape[2] == 0:
        raise DataError("no route to score", "at least one route a token", "Sample routes first.")
    if remedy := _shape_remedy(given, batch, pos, spec.top_k):
        raise RouteError(
            f"routes of shape {tuple(given.shape)} and dtype {given.dtype}",
            f"integers of shape [{batch}, {pos}, route, {spec.top_k}]: an equal number of experts",
            remedy,
        )
    given = given.long()
    check_route(given, spec.n_experts, f"layer {layer}")
    fixed = None if weights is None else as_routes(weights, "weights").to(tokens.device)
    if fixed is not None and (fixed.shape != given.shape or not bool(fixed.isfinite().all())):
        raise RouteError(
            f"weights of shape {tuple(fixed.shape)}" + ("" if fixed.shape != given.shape else " that are not finite"),
            f"a finite weight for each slot, of shape {tuple(given.shape)}",
            "Leave weights out for the family's own.",
        )
    return given, fixed


def _shape_remedy(routes: Tensor, batch: int, pos: int, slots: int) -> str | None:
    """What to do about routes that do not fit the tokens; None where they do."""
    if routes.ndim == 3 and routes.shape[:2] == (batch, pos):
        return "Give one route a token as routes.unsqueeze(2)."
    if routes.ndim == 3 and batch == 1 and routes.shape[0] == pos:
        return "Give the routes of one sequence as routes.unsqueeze(0)."
    if routes.ndim != 4:
        return "Give each token of each sequence its own routes."
    if not is_integer(routes):
        return "Pass expert ids as integers."
    if routes.shape[:2] != (batch, pos):
        return "Give routes at every position, also where none is scored (of -1 there, say)."
    if routes.shape[3] < slots:
        return "Fill routes of fewer experts with -1."
    return f"Leave experts out: a token of this layer uses {slots}." if routes.shape[3] > slots else None


def as_routes(values: Any, name: str) -> Tensor:
    """Routes or weights as a tensor.

    Raises:
        RouteError: they make none.
    """
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        given = f"{name} of type {type(values).__name__} that make no tensor ({error})"
        raise RouteError(given, "a tensor [batch, pos, route, slot]", f"Pass {name} of one shape.") from None


def decoder_layer(moe: MoEHooks, layer: Layer) -> int:
    """The label of one MoE layer of a decoder, counted from 0."""
    check_attached(moe)
    if isinstance(moe.layers[0], tuple):
        raise ConfigError(
            f"{moe.spec(moe.layers[0]).family.name}, an encoder-decoder",
            "a causal decoder",
            "The order in which a decoder predicts the next token is needed here; use the hooks directly.",
        )
    label = moe.layer_label(layer)
    assert isinstance(label, int)
    return label


def decoder_layers(moe: MoEHooks, layers: Any = None) -> tuple[int, ...]:
    """Labels of MoE layers of a decoder, each once and in order.

    Args:
        moe: Attached hooks.
        layers: None for all, one label, or several (any iterable, array or tensor).

    Raises:
        HookError: a layer that is dense or does not exist.
        ConfigError: no layer, or an encoder-decoder.
    """
    check_attached(moe)
    layers = plain_label(moe.layers if layers is None else layers)
    several = layers.tolist() if hasattr(layers, "tolist") else layers
    is_one = isinstance(several, str) or not isinstance(several, Iterable)
    chosen = {decoder_layer(moe, layer) for layer in ([several] if is_one else several)}
    if not chosen:
        raise ConfigError("no layers", f"at least one of {list(moe.layers)}", "Leave layers out for all of them.")
    return tuple(sorted(chosen))


def by_label(moe: MoEHooks, given: Mapping[Any, Tensor], name: str = "routes") -> dict[int, Tensor]:
    """Routes or weights that are given by layer, as tensors, with the layers as they are counted.

    Raises:
        RouteError: one layer under two names, such as 3 and -1; or not by layer.
    """
    if not isinstance(given, Mapping):
        expected = f"a mapping from layers to {name}"
        raise RouteError(f"a {type(given).__name__} in place of {name} by layer", expected, f"Pass {{layer: {name}}}.")
    found = {decoder_layer(moe, layer): as_routes(value, name) for layer, value in given.items()}
    if len(found) < len(given):
        raise RouteError(
            f"layers {list(given)}", "each layer once", "Name layers by one index, from 0 or from the end."
        )
    return found
