"""Hold single neurons of an expert at a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks, check_attached
from moe_interp.interventions.named import checked_experts, checked_neurons
from moe_interp.interventions.positions import Positions, TokenSelection
from moe_interp.types import Hooks, Layer


def ablate_neurons(
    moe: MoEHooks,
    layer: Layer,
    expert: int,
    neurons: int | Sequence[int],
    positions: Positions = None,
    attention_mask: Tensor | None = None,
) -> Hooks:
    """Set hidden neurons of an expert to 0 wherever a token uses it, in whichever slot it stands.

    Args:
        moe: Attached hooks with ``expert_outputs=True``.
        layer, expert, neurons, positions, attention_mask: See :func:`clamp_neurons`.

    Raises:
        As :func:`clamp_neurons`.
    """
    return _hold(moe, layer, expert, neurons, 0.0, positions, attention_mask, "ablate_neurons")


def clamp_neurons(
    moe: MoEHooks,
    layer: Layer,
    expert: int,
    neurons: int | Sequence[int],
    value: float | Sequence[float] | Tensor,
    positions: Positions = None,
    attention_mask: Tensor | None = None,
) -> Hooks:
    """Hold hidden neurons of an expert at a value wherever a token uses it, in whichever slot it stands.

    It writes ``expert_post``: the neurons after the activation (and its product with the gated branch, where there is
    one), before the expert's second map. Tokens that do not use the expert are untouched, and it makes none use it:
    ``promote_experts`` before it does.

    Args:
        moe: Attached hooks with ``expert_outputs=True``.
        layer: An MoE layer.
        expert: An expert's id.
        neurons: Numbers of its neurons, from 0 to d_expert - 1.
        value: One number for all, or one a neuron, in the units of ``expert_post``.
        positions, attention_mask: See :class:`moe_interp.interventions.positions.TokenSelection`.

    Raises:
        HookError: a layer that is dense or not there, or experts whose neurons cannot be read.
        RouteError: an expert that is not there.
        ConfigError: no neurons, one twice or not there, several experts, or values that are not finite or do not fit.
    """
    return _hold(moe, layer, expert, neurons, value, positions, attention_mask, "clamp_neurons")


def _hold(
    moe: MoEHooks,
    layer: Layer,
    expert: int,
    neurons: Any,
    value: Any,
    positions: Positions,
    attention_mask: Tensor | None,
    name: str,
) -> Hooks:
    check_attached(moe)
    layer = moe.layer_label(layer)
    point = moe.hook_name("expert_post", layer)
    ids = checked_experts(moe, layer, expert, name)
    if len(ids) > 1:
        raise ConfigError(f"experts {ids.tolist()} for {name}", "one expert", "Join the lists of several calls.")
    held, values = checked_neurons(moe, layer, neurons, name), _values(value)
    if values.numel() not in (1, len(held)) or not bool(torch.isfinite(values).all()):
        raise ConfigError(
            f"value={str(value)[:60]} for {len(held)} neurons", "a finite number, or one a neuron", "Correct the value."
        )
    where, one = TokenSelection(moe, layer, positions, attention_mask), int(ids)

    def hold(activation: Tensor, hook: Any) -> Tensor:
        route = moe.running(layer).indices
        assert route is not None
        asked = (route == one) & where.tokens(activation).unsqueeze(-1)
        # shape: (batch, pos, slot, d_expert); neurons that are not held keep their own values
        new = activation.clone()
        new[..., held.to(activation.device)] = values.to(activation)
        return torch.where(asked.unsqueeze(-1), new, activation)

    return [(point, hold)]


def _values(value: Any) -> Tensor:
    try:
        return torch.as_tensor(value, dtype=torch.float64).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        return torch.empty(0)
