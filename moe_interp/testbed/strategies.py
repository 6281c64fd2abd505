"""Routing strategies: hooks that change the route, plus an auxiliary loss. The model code is never forked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_interp.hooks.attach import MoEHooks
from moe_interp.types import Layer

Hook = tuple[str, Callable[..., Any]]


@dataclass(frozen=True)
class RouterRecord:
    """One layer's router in a micro-batch.

    Attributes:
        logits: ``[batch, pos, expert]`` as the router gave them, with gradient in training.
        indices: ``[batch, pos, slot]`` experts that ran, after the strategy's hooks; -1 is an empty slot.
    """

    logits: Tensor
    indices: Tensor

    def load(self) -> Tensor:
        """f: share of the filled slots of each expert, ``[expert]``, summing to 1."""
        used = self.indices.flatten()
        counts = torch.bincount(used[used >= 0], minlength=self.logits.shape[-1])
        return counts / counts.sum().clamp_min(1)


Records = Mapping[Layer, RouterRecord]
Loads = Mapping[Layer, Tensor]


def recorded(moe: MoEHooks, run: Callable[[], Tensor], hooks: Sequence[Hook] = ()) -> tuple[Tensor, Records]:
    """Logits of a forward pass and what each router did; logits are read before ``hooks`` edit them, indices after."""
    logits: dict[Layer, Tensor] = {}
    indices: dict[Layer, Tensor] = {}

    def readers(name: str, store: dict[Layer, Tensor]) -> list[Hook]:
        return [(moe.hook_name(name, layer), partial(_keep, store, layer)) for layer in moe.layers]

    every = [*readers("router_logits", logits), *hooks, *readers("expert_indices", indices)]
    with moe.bridge.hooks(fwd_hooks=every):
        out = run()
    return out, {layer: RouterRecord(logits[layer], indices[layer]) for layer in logits}


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


class Strategy:
    """No balancing: the family's own routing and no auxiliary loss. Others override what they need.

    ``needs_step_load``: the loop measures the load of the whole optimiser step, over all processes and micro-batches,
    in a pass without gradient beforehand, and hands it to :meth:`auxiliary_loss`.
    """

    name = "none"
    needs_step_load = False

    def bind(self, moe: MoEHooks, domains: tuple[str, ...], seed: int) -> None:
        """Called once, before the first step."""

    def fwd_hooks(self, moe: MoEHooks, batch: Batch) -> list[Hook]:
        """Hooks for this micro-batch, as ``run_with_hooks`` takes them."""
        return []

    def auxiliary_loss(self, records: Records, step_load: Loads | None) -> Tensor | float:
        """The auxiliary loss of one micro-batch, summed over layers, before its coefficient."""
        return 0.0

    def after_step(self, loads: Loads) -> None:
        """Called after each optimiser step with every layer's load over the whole step."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""


class MicroBatchBalance(Strategy):
    """sum over layers of E * sum_e f_e P_e, f and P of the micro-batch (Fedus et al. 2021, f over all top-k slots).

    1 per layer for balanced use, E for collapsed use. Per layer, unlike transformers' own, which pools the layers.
    """

    name = "micro_batch"

    def auxiliary_loss(self, records: Records, step_load: Loads | None) -> Tensor | float:
        return sum((balance_loss(record.logits, record.load()) for record in records.values()), torch.tensor(0.0))


def balance_loss(logits: Tensor, load: Tensor) -> Tensor:
    """E * sum_e f_e P_e of one layer: ``logits [..., expert]`` give P (mean probability), ``load [expert]`` is f."""
    mean_probs = logits.float().softmax(-1).flatten(0, -2).mean(0)
    return logits.shape[-1] * (load.detach() * mean_probs).sum()


STRATEGIES: dict[str, type[Strategy]] = {strategy.name: strategy for strategy in (Strategy, MicroBatchBalance)}
