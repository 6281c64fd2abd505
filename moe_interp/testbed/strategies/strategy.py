"""What a routing strategy is: hooks that change the route, plus an auxiliary loss. The model code is never forked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_interp.arch.routing_rule import at_least_float
from moe_interp.hooks.attach import MoEHooks
from moe_interp.testbed.config import TestbedConfig
from moe_interp.types import Layer

Hook = tuple[str, Callable[..., Any]]


@dataclass(frozen=True)
class RouterRecord:
    """One layer's router in a micro-batch.

    Attributes:
        logits: ``[batch, pos, expert]`` as the router gave them, with gradient in training.
        chosen: ``[batch, pos, slot]`` experts after the strategy's hooks; -1 is an empty slot. Balance is of these.
        indices: The same after dropping: the experts that ran.
        inputs: ``[batch, pos, d_model]``, what the router read, where that was asked for.
    """

    logits: Tensor
    chosen: Tensor
    indices: Tensor
    inputs: Tensor | None = None

    def load(self) -> Tensor:
        """f: share of chosen slots of each expert, ``[expert]``, summing to 1; also of dropped ones (as in Switch)."""
        counts = slots_taken(self.chosen, self.logits.shape[-1]).flatten(0, 1).sum(0)
        return counts / counts.sum().clamp_min(1)


Records = Mapping[Layer, RouterRecord]
Loads = Mapping[Layer, Tensor]


def slots_taken(indices: Tensor, n_experts: int) -> Tensor:
    """Slots that each token fills with each expert; -1 is an empty slot. ``[..., slot] -> [..., expert]`` int64.

    By comparison: torch's own counts look at the largest id, or drop empty slots, and so wait for the device.
    """
    return (indices.unsqueeze(-1) == torch.arange(n_experts, device=indices.device)).sum(-2)


def recorded(
    moe: MoEHooks,
    run: Callable[[], Tensor],
    hooks: Sequence[Hook] = (),
    dropping: Sequence[Hook] = (),
    router_inputs: bool = False,
) -> tuple[Tensor, Records]:
    """Logits of a forward pass and what each router did: its logits before ``hooks`` edit them, what was chosen after
    them and before ``dropping``, what ran after both; and what it read, if ``router_inputs``."""
    logits: dict[Layer, Tensor] = {}
    chosen: dict[Layer, Tensor] = {}
    indices: dict[Layer, Tensor] = {}
    inputs: dict[Layer, Tensor] = {}

    def readers(name: str, store: dict[Layer, Tensor]) -> list[Hook]:
        return [(moe.hook_name(name, layer), partial(_keep, store, layer)) for layer in moe.layers]

    before = readers("expert_indices", chosen) if dropping else []
    every = [*readers("router_logits", logits), *hooks, *before, *dropping, *readers("expert_indices", indices)]
    every += readers("router_in", inputs) if router_inputs else []
    with moe.bridge.hooks(fwd_hooks=every):
        out = run()
    chosen = chosen or indices
    return out, {
        layer: RouterRecord(logits[layer], chosen[layer], indices[layer], inputs.get(layer)) for layer in logits
    }


def _keep(store: dict[Layer, Tensor], layer: Layer, value: Tensor, hook: Any) -> None:
    store[layer] = value


@dataclass(frozen=True)
class Batch:
    """What a strategy may know of the micro-batch it routes.

    Attributes:
        tokens, domain: ``[batch, pos]`` ids and domain labels (only the reference router may look at the latter).
        step: The optimiser step.
        training: False in validation.
    """

    tokens: Tensor
    domain: Tensor
    step: int
    training: bool


@dataclass(frozen=True)
class Setting:
    """What a strategy is made from. ``reduce`` averages a tensor over processes."""

    moe: MoEHooks
    config: TestbedConfig
    domains: tuple[str, ...]
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.moe.layers


class Strategy:
    """No balancing: the family's own routing and no auxiliary loss. Others override what they need.

    ``needs_step_load``: the loop measures the load of the whole optimiser step, over all processes and micro-batches,
    in a pass without gradient beforehand, and hands it to :meth:`auxiliary_loss`.
    ``has_varying_width``: routes are wider at one step than at another, so that nothing is compiled for their shape.
    """

    name = "none"
    needs_step_load = False
    has_varying_width = False

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def rebind(self, moe: MoEHooks) -> None:
        """Go on with other hooks on the same model."""
        self.setting = replace(self.setting, moe=moe)

    def fwd_hooks(self, batch: Batch) -> list[Hook]:
        """Hooks for this micro-batch, as ``run_with_hooks`` takes them."""
        return []

    def dropping_hooks(self, batch: Batch) -> list[Hook]:
        """Hooks that empty slots of what was chosen; they come after all others."""
        return []

    def auxiliary_loss(self, records: Records, batch: Batch, step_load: Loads | None) -> Tensor:
        """The auxiliary loss of one micro-batch, summed over layers, its coefficient included."""
        return torch.zeros((), device=batch.tokens.device)

    def after_step(self, loads: Loads) -> None:
        """Called after each optimiser step with every layer's load over the whole step."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""


def routed_by(
    moe: MoEHooks,
    layer: Layer,
    pick: Callable[[Tensor, Tensor], Tensor],
    weigh: Callable[[Tensor], Tensor] | None = None,
) -> list[Hook]:
    """Hooks that set a layer's experts: ``pick(logits, indices) -> indices``, and their weights by ``weigh(weights)``.

    Without ``weigh`` the weights are the family's own for the experts picked, so that the gate goes on learning.
    """
    seen: list[Tensor] = []

    def read(value: Tensor, hook: Any) -> None:
        seen[:] = [value]

    hooks: list[Hook] = [(moe.hook_name("router_logits", layer), read)]
    hooks.append((moe.hook_name("expert_indices", layer), lambda value, hook: pick(seen[0], value)))
    if weigh is not None:
        hooks.append((moe.hook_name("expert_weights", layer), lambda value, hook: weigh(value)))
    return hooks


def by_score(scores: Tensor, chosen: Tensor) -> Tensor:
    """Slots of the experts chosen, best score first, -1 where a token has fewer. ``[..., expert] -> [..., slot]``."""
    width = max(1, int(chosen.sum(-1).max()))
    top = scores.masked_fill(~chosen, -torch.inf).topk(width, dim=-1)
    return top.indices.masked_fill(top.values == -torch.inf, -1)


def softmax(logits: Tensor) -> Tensor:
    """Probabilities, in float32 at least."""
    return at_least_float(logits).softmax(-1)
