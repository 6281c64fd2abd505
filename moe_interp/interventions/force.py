"""Force given experts, or whole routes, on tokens; swap two experts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from moe_interp.errors import ConfigError, RouteError
from moe_interp.hooks.attach import MoEHooks, check_attached
from moe_interp.hooks.layer import check_route
from moe_interp.interventions.named import checked_experts
from moe_interp.interventions.positions import Positions, TokenSelection, pack_routes
from moe_interp.interventions.route_writer import RouteWriter
from moe_interp.types import Hooks, Layer

Mass = Literal["one", "natural"]


def force_experts(
    moe: MoEHooks,
    layer: Layer,
    experts: int | Sequence[int],
    weights: float | Sequence[float] | None = None,
    mass: Mass = "one",
    positions: Positions = None,
    attention_mask: Tensor | None = None,
) -> Hooks:
    """Send tokens of one layer through given experts, whatever the router says.

    One expert runs with weight 1 (``mass="one"``) or with the token's natural sum of weights (``mass="natural"``).
    Several experts run with the family's own weights for that set, or with ``weights``.

    Args:
        moe: Attached hooks.
        layer: An MoE layer.
        experts: One expert id, or several different ones.
        weights: One weight an expert, used as they are.
        mass: What a single expert's weight is.
        positions, attention_mask: See :class:`moe_interp.interventions.positions.TokenSelection`.

    Raises:
        RouteError: an id out of range, or an expert twice.
        ConfigError: another mass, no experts, or weights that do not fit.
    """
    check_attached(moe)
    check_mass(mass)
    ids = checked_experts(moe, layer, experts, "force_experts")
    fixed = None if weights is None else torch.as_tensor(weights, dtype=torch.float64).reshape(-1)
    if fixed is not None and (len(fixed) != len(ids) or mass != "one"):
        raise ConfigError(
            f"{len(ids)} experts and {len(fixed)} weights with mass={mass!r}",
            'one weight an expert, used as they are, and mass="one"',
            "Give as many weights as experts, and leave mass out.",
        )
    if fixed is None and len(ids) == 1:
        return _force_one(moe, layer, ids, mass, TokenSelection(moe, layer, positions, attention_mask))
    return set_routes(moe, layer, ids, fixed, positions, attention_mask)


def set_routes(
    moe: MoEHooks,
    layer: Layer,
    indices: Tensor | Sequence[Any],
    weights: Tensor | Sequence[Any] | None = None,
    positions: Positions = None,
    attention_mask: Tensor | None = None,
) -> Hooks:
    """Give tokens of one layer a route: which experts run, and with which weights.

    Args:
        moe: Attached hooks.
        layer: An MoE layer.
        indices: ``[slot]``, ``[pos, slot]`` or ``[batch, pos, slot]`` expert ids, -1 for an empty slot; broadcast. The
            first of ``pos`` is the first column of the prompt, also where a part of it is cached; routes for as many
            columns as a single pass has that continues a cached prefix are that pass's.
        weights: Of the same shape, used as they are; the family's own weights for that set by default.
        positions, attention_mask: See :class:`moe_interp.interventions.positions.TokenSelection`.

    Raises:
        RouteError: an id out of range, an expert twice, or weights of another shape.
    """
    check_attached(moe)
    routes = torch.as_tensor(indices)
    if routes.is_floating_point() or routes.dtype == torch.bool or routes.ndim not in (1, 2, 3):
        raise RouteError(
            f"routes of shape {tuple(routes.shape)} and dtype {routes.dtype}",
            "integers [slot], [pos, slot] or [batch, pos, slot]",
            "Pass expert ids.",
        )
    check_route(routes, moe.spec(layer).n_experts, "set_routes")
    fixed = None if weights is None else torch.as_tensor(weights)
    if fixed is not None and fixed.shape != routes.shape:
        raise RouteError(
            f"weights of shape {tuple(fixed.shape)} for routes of shape {tuple(routes.shape)}",
            "one weight a slot",
            "Give both the same shape.",
        )
    routes, fixed = pack_routes(routes, fixed)
    selection = TokenSelection(moe, layer, positions, attention_mask)

    weigh = None if fixed is None else partial(_broadcast, fixed, selection)
    return RouteWriter(moe, layer, selection, partial(_broadcast, routes, selection), weigh, is_named=True).hooks


def swap_experts(
    moe: MoEHooks,
    layer: Layer,
    a: int,
    b: int,
    weights: Literal["family", "kept"] = "family",
    positions: Positions = None,
    attention_mask: Tensor | None = None,
) -> Hooks:
    """Send tokens that are routed to expert ``a`` to ``b``, and the reverse, in the same slot.

    A token that uses both, or neither, keeps its set of experts.

    Args:
        moe: Attached hooks.
        layer: An MoE layer.
        a, b: Two experts.
        weights: "family": the family's own weights for the new set, in which an expert that the router scored low
            weighs little. "kept": each slot keeps the weight that the family gave its former expert, so that only what
            is computed changes.
        positions, attention_mask: See :class:`moe_interp.interventions.positions.TokenSelection`.

    Raises:
        RouteError: an id out of range, or the same expert twice.
        ConfigError: other weights.
    """
    check_attached(moe)
    one, other = (checked_experts(moe, layer, expert, "swap_experts") for expert in (a, b))
    pair = checked_experts(moe, layer, [*one.tolist(), *other.tolist()], "swap_experts")
    if len(pair) != 2 or weights not in ("family", "kept"):
        raise ConfigError(
            f"a={a!r}, b={b!r}, weights={weights!r}", 'two experts, and "family" or "kept"', "Correct the arguments."
        )
    before = object()  # the key of what the pass remembers
    first, second = pair.tolist()

    def route(value: Tensor) -> Tensor:
        run = moe.running(layer)
        run.notes[before] = run.family_weights(value)
        return torch.where(value == first, second, torch.where(value == second, first, value))

    def keep(value: Tensor) -> Tensor:
        return moe.running(layer).notes[before].to(value)

    selection = TokenSelection(moe, layer, positions, attention_mask)
    return RouteWriter(moe, layer, selection, route, keep if weights == "kept" else None).hooks


class NaturalMass:
    """The sum of the weights that a token's route has before an intervention edits it."""

    def __init__(self, moe: MoEHooks, layer: Layer) -> None:
        self.moe, self.layer = moe, layer

    def read(self, route: Tensor) -> None:
        """Take the route at ``expert_indices``."""
        run = self.moe.running(self.layer)
        run.notes[self] = run.family_weights(route).sum(dim=-1, keepdim=True)

    def take(self) -> Tensor:
        """``[batch, pos, 1]``, later in the same pass."""
        return self.moe.running(self.layer).notes[self]


def _force_one(moe: MoEHooks, layer: Layer, forced: Tensor, mass: Mass, selection: TokenSelection) -> Hooks:
    natural = NaturalMass(moe, layer)

    def route(value: Tensor) -> Tensor:
        if mass == "natural":
            natural.read(value)
        return _broadcast(forced, selection, value)

    def weigh(value: Tensor) -> Tensor:
        return torch.ones_like(value[..., :1]) if mass == "one" else natural.take()

    return RouteWriter(moe, layer, selection, route, weigh, is_named=True).hooks


def _broadcast(values: Tensor, selection: TokenSelection, like: Tensor) -> Tensor:
    """``[..., slot]`` given once, for each position or for each token, to ``[batch, pos, slot]``."""
    batch, pos = like.shape[:2]
    values = values.to(like.device)
    values = values if values.ndim == 1 else selection.rows(values, like)
    try:
        return values.expand(batch, pos, values.shape[-1])
    except RuntimeError:
        raise RouteError(
            f"routes of shape {tuple(values.shape)} for a pass of {batch} x {pos} tokens",
            f"a shape that broadcasts to [{batch}, {pos}, slot]",
            "Give one route, one a position, or one a token; the model was left as it was.",
        ) from None


def check_mass(mass: str) -> None:
    """Refuse any mass but "one" and "natural"."""
    if mass not in ("one", "natural"):
        raise ConfigError(f"mass={mass!r}", '"one" or "natural"', 'Use "one" for weight 1.')
