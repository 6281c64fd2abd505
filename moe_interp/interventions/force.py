"""Force given experts, or whole routes, on tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from moe_interp.arch.rules import RoutingRule
from moe_interp.errors import ConfigError, RouteError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.layer import check_route
from moe_interp.interventions.where import Positions, Where, merge_slots, merge_weights, pack_routes
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
        positions, attention_mask: See :class:`moe_interp.interventions.where.Where`.

    Raises:
        RouteError: an id out of range, or an expert twice.
        ConfigError: another mass, no experts, or weights that do not fit.
    """
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
        return _force_one(moe, layer, ids, mass, Where(moe, positions, attention_mask))
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
        indices: ``[slot]``, ``[pos, slot]`` or ``[batch, pos, slot]`` expert ids, -1 for an empty slot; broadcast.
        weights: Of the same shape, used as they are; the family's own weights for that set by default.
        positions, attention_mask: See :class:`moe_interp.interventions.where.Where`.

    Raises:
        RouteError: an id out of range, an expert twice, or weights of another shape.
    """
    routes = torch.as_tensor(indices)
    if routes.is_floating_point() or routes.ndim not in (1, 2, 3):
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
    where = Where(moe, positions, attention_mask)

    def set_indices(value: Tensor, hook: Any) -> Tensor:
        tokens = where.tokens(value)
        return merge_slots(tokens, _broadcast(routes, value), value) if bool(tokens.any()) else value

    def set_weights(value: Tensor, hook: Any) -> Tensor:
        assert fixed is not None
        tokens = where.tokens(value)
        return merge_weights(tokens, _broadcast(fixed, value), value) if bool(tokens.any()) else value

    hooks: Hooks = [(moe.hook_name("expert_indices", layer), set_indices)]
    return hooks if fixed is None else [*hooks, (moe.hook_name("expert_weights", layer), set_weights)]


class NaturalMass:
    """The sum of the weights that a token's own route has, learned from the hooks that fire before an edit."""

    def __init__(self, moe: MoEHooks, layer: Layer) -> None:
        self.moe, self.layer = moe, layer
        self.logits: Tensor | None = None
        self.total: Tensor | None = None

    def read_logits(self, value: Tensor, hook: Any) -> None:
        self.logits = value

    def read_route(self, value: Tensor) -> None:
        """Take the native route (at ``expert_indices``, before it is edited)."""
        assert self.logits is not None
        rule: RoutingRule = self.moe.spec(self.layer).rule
        self.total = rule.weights(self.logits, value).sum(dim=-1, keepdim=True)
        self.logits = None

    def take(self) -> Tensor:
        """``[batch, pos, 1]``."""
        assert self.total is not None
        total, self.total = self.total, None
        return total


def _force_one(moe: MoEHooks, layer: Layer, forced: Tensor, mass: Mass, where: Where) -> Hooks:
    natural = NaturalMass(moe, layer) if mass == "natural" else None

    def set_indices(value: Tensor, hook: Any) -> Tensor:
        if natural is not None:
            natural.read_route(value)
        return merge_slots(where.tokens(value), _broadcast(forced, value), value)

    def set_weights(value: Tensor, hook: Any) -> Tensor:
        new = torch.zeros_like(value)
        new[..., :1] = 1.0 if natural is None else natural.take()
        return torch.where(where.tokens(value).unsqueeze(-1), new, value)

    hooks: Hooks = [
        (moe.hook_name("expert_indices", layer), set_indices),
        (moe.hook_name("expert_weights", layer), set_weights),
    ]
    return hooks if natural is None else [(moe.hook_name("router_logits", layer), natural.read_logits), *hooks]


def _broadcast(values: Tensor, like: Tensor) -> Tensor:
    """``[..., slot]`` given once, for each position or for each token, to ``[batch, pos, slot]``."""
    batch, pos = like.shape[:2]
    values = values.to(like.device)
    try:
        return values.expand(batch, pos, values.shape[-1])
    except RuntimeError:
        raise RouteError(
            f"routes of shape {tuple(values.shape)} for a pass of {batch} x {pos} tokens",
            f"a shape that broadcasts to [{batch}, {pos}, slot]",
            "Give one route, one a position, or one a token; the model was left as it was.",
        ) from None


def checked_experts(moe: MoEHooks, layer: Layer, experts: int | Sequence[int] | Tensor, where: str) -> Tensor:
    """``[expert]`` ids of one or several different experts of a layer.

    Raises:
        ConfigError: no experts.
        RouteError: an id that is no integer or out of range, or an expert twice.
    """
    ids, n_experts = torch.as_tensor(experts).reshape(-1), moe.spec(layer).n_experts
    if not len(ids):
        raise ConfigError(f"no experts for {where}", f"ids from 0 to {n_experts - 1}", "Name at least one expert.")
    if ids.is_floating_point() or ids.dtype == torch.bool or bool((ids < 0).any()):
        raise RouteError(
            f"experts {ids.tolist()} for {where}",
            f"integers from 0 to {n_experts - 1}",
            "Name existing experts; set_routes takes -1 for an empty slot.",
        )
    check_route(ids, n_experts, where)
    return ids.long()


def check_mass(mass: str) -> None:
    """Refuse any mass but "one" and "natural"."""
    if mass not in ("one", "natural"):
        raise ConfigError(f"mass={mass!r}", '"one" or "natural"', 'Use "one" for weight 1.')
