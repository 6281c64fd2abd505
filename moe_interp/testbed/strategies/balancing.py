"""Strategies that even out the use of experts by a loss or a bias; the family routes as it does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_interp.arch.routing_rule import at_least_float
from moe_interp.testbed.strategies.strategy import (
    Batch,
    Hook,
    Loads,
    Records,
    Setting,
    Strategy,
    routed_by,
    slots_taken,
    softmax,
)
from moe_interp.types import Layer


def balance_loss(probs: Tensor, load: Tensor) -> Tensor:
    """E * sum_e f_e P_e: 1 where use is balanced, E where it has collapsed.

    Args:
        probs: ``[..., token, expert]``; P is their mean over tokens, with gradient.
        load: ``[..., expert]``, f, each row summing to 1; it gets no gradient.

    Source: Fedus et al. 2021, with f over all top-k slots.
    """
    return probs.shape[-1] * (load.detach() * probs.mean(-2)).sum(-1)


class MicroBatchBalance(Strategy):
    """Auxiliary load-balancing loss with f and P of the micro-batch; per layer (transformers' own pools the layers)."""

    name = "micro_batch"

    def probs(self, logits: Tensor) -> Tensor:
        """What P is the mean of."""
        return softmax(logits)

    def load(self, layer: Layer, records: Records, step_load: Loads | None) -> Tensor:
        """f, whose scope is all that the three auxiliary strategies differ in."""
        return records[layer].load()

    def auxiliary_loss(self, records: Records, batch: Batch, step_load: Loads | None) -> Tensor:
        total = super().auxiliary_loss(records, batch, step_load)
        for layer, record in records.items():
            probs = self.probs(record.logits).flatten(0, -2)
            total = total + balance_loss(probs, self.load(layer, records, step_load))
        return self.setting.config.balance * total


class SequenceBalance(Strategy):
    """The same with f and P of each sequence, averaged over sequences: the strictest scope."""

    name = "sequence"

    def auxiliary_loss(self, records: Records, batch: Batch, step_load: Loads | None) -> Tensor:
        total = super().auxiliary_loss(records, batch, step_load)
        for record in records.values():
            # shape: (batch, pos, slot) -> (batch, pos, expert) -> (batch, expert)
            counts = slots_taken(record.chosen, record.logits.shape[-1]).sum(1).float()
            load = counts / counts.sum(-1, keepdim=True).clamp_min(1)
            total = total + balance_loss(softmax(record.logits), load).mean()
        return self.setting.config.balance * total


class GlobalBalance(MicroBatchBalance):
    """The same with f of the whole optimiser step, over all processes and accumulation steps; P stays local."""

    name = "global"
    needs_step_load = True

    def load(self, layer: Layer, records: Records, step_load: Loads | None) -> Tensor:
        return records[layer].load() if step_load is None else step_load[layer]


class GlobalRunningBalance(MicroBatchBalance):
    """The same with f from a running mean over steps (``load_decay``): nearly global, without the extra pass."""

    name = "global_running"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.running: dict[Layer, Tensor] = {}

    def load(self, layer: Layer, records: Records, step_load: Loads | None) -> Tensor:
        return self._mixed(layer, records[layer].load())

    def _mixed(self, layer: Layer, load: Tensor) -> Tensor:
        decay = self.setting.config.load_decay
        return decay * self.running[layer] + (1 - decay) * load if layer in self.running else load

    def after_step(self, loads: Loads) -> None:
        self.running = {layer: self._mixed(layer, load) for layer, load in loads.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"running": self.running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.running = state["running"]


class LossFreeBias(Strategy):
    """A bias b on the scores, for the choice only: after each step b += bias_rate * sign(mean load - load).

    Source: Wang et al. 2024. Weights stay those of the unbiased scores.
    """

    name = "loss_free"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.bias = {layer: torch.zeros(setting.moe.spec(layer).n_experts) for layer in setting.layers}

    def fwd_hooks(self, batch: Batch) -> list[Hook]:
        return [hook for layer in self.setting.layers for hook in self._biased(layer)]

    def _biased(self, layer: Layer) -> list[Hook]:
        rule, moe = self.setting.moe.spec(layer).rule, self.setting.moe

        def pick(logits: Tensor, indices: Tensor) -> Tensor:
            scores = rule.scores(logits)
            self.bias[layer] = self.bias[layer].to(logits.device)
            biased = at_least_float(logits if scores is None else scores) + self.bias[layer]
            return biased.topk(indices.shape[-1], dim=-1).indices

        return routed_by(moe, layer, pick)

    def after_step(self, loads: Loads) -> None:
        for layer, load in loads.items():
            self.bias[layer] = self.bias[layer].to(load) + self.setting.config.bias_rate * torch.sign(
                load.mean() - load
            )

    def state_dict(self) -> dict[str, Any]:
        return {"bias": self.bias}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bias = state["bias"]


class ZLoss(Strategy):
    """z_coefficient * mean(logsumexp(logits)^2), summed over layers (Zoph et al. 2022): small logits, no balance."""

    name = "z_loss"

    def auxiliary_loss(self, records: Records, batch: Batch, step_load: Loads | None) -> Tensor:
        total = super().auxiliary_loss(records, batch, step_load)
        for record in records.values():
            total = total + at_least_float(record.logits).logsumexp(-1).square().mean()
        return self.setting.config.z_coefficient * total
