"""Strategies that route otherwise than the family: by other scores, by expert, by hash, at random, with a capacity."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moe_interp.arch.routing_rule import at_least_float
from moe_interp.interventions.random_keys import layer_labels, uniform_keys
from moe_interp.testbed.strategies.balancing import MicroBatchBalance
from moe_interp.testbed.strategies.strategy import (
    Batch,
    Hook,
    Loads,
    Setting,
    Strategy,
    by_score,
    routed_by,
    slots_taken,
    softmax,
)
from moe_interp.types import Layer


class SigmoidScores(MicroBatchBalance):
    """Sigmoid scores in the place of the softmax, with the micro-batch balance loss on the normalised scores.

    The choice is the same, since both rise with the logit; the weights and their gradients are not.
    """

    name = "sigmoid"

    def probs(self, logits: Tensor) -> Tensor:
        scores = at_least_float(logits).sigmoid()
        return scores / scores.sum(-1, keepdim=True)

    def fwd_hooks(self, batch: Batch) -> list[Hook]:
        return [hook for layer in self.setting.layers for hook in self._scored(layer)]

    def _scored(self, layer: Layer) -> list[Hook]:
        moe, seen = self.setting.moe, dict[str, Tensor]()

        def read(value: Tensor, hook: Any) -> None:
            seen["logits"] = value

        def score(value: Tensor, hook: Any) -> Tensor:
            return seen["logits"].sigmoid().to(value.dtype)

        return [(moe.hook_name("router_logits", layer), read), (moe.hook_name("router_probs", layer), score)]


class ExpertChoice(Strategy):
    """Each expert takes its k T / E best tokens of the micro-batch; a token may have none, or all (Zhou et al. 2022).

    That looks at future tokens. Outside training, therefore, a token takes the experts whose score is above a
    threshold: the running mean (``load_decay``) of the lowest score an expert took in training. **Its training loss is
    no language-modelling loss and may not be ranked against others; its validation loss is causal.**
    """

    name = "expert_choice"
    has_varying_width = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.threshold: dict[Layer, Tensor] = {}
        self._taken: dict[Layer, list[Tensor]] = {}

    def fwd_hooks(self, batch: Batch) -> list[Hook]:
        return [hook for layer in self.setting.layers for hook in self._chosen(layer, batch.training)]

    def _chosen(self, layer: Layer, training: bool) -> list[Hook]:
        def pick(logits: Tensor, indices: Tensor) -> Tensor:
            probs = softmax(logits)
            if not training and layer in self.threshold:
                return by_score(probs, probs >= self.threshold[layer].to(probs.device))
            flat = probs.detach().flatten(0, -2)
            n_tokens = math.ceil(flat.shape[0] * indices.shape[-1] / flat.shape[1])
            top = flat.topk(min(n_tokens, flat.shape[0]), dim=0)
            if training:
                self._taken.setdefault(layer, []).append(top.values[-1])
            taken = torch.zeros_like(flat, dtype=torch.bool).scatter(0, top.indices, True)
            return by_score(probs, taken.view_as(probs))

        return routed_by(self.setting.moe, layer, pick)

    def after_step(self, loads: Loads) -> None:
        decay = self.setting.config.load_decay
        for layer, taken in self._taken.items():
            new = self.setting.reduce(torch.stack(taken).mean(0))
            old = self.threshold.get(layer, new)
            self.threshold[layer] = decay * old.to(new) + (1 - decay) * new
        self._taken = {}

    def state_dict(self) -> dict[str, Any]:
        return {"threshold": self.threshold}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.threshold = state["threshold"]


class HashRouting(Strategy):
    """k experts fixed by token id and layer (Roller et al. 2021); the gate learns their weights only."""

    name = "hash"

    def fwd_hooks(self, batch: Batch) -> list[Hook]:
        return [hook for layer in self.setting.layers for hook in self._drawn(layer, batch)]

    def _drawn(self, layer: Layer, batch: Batch) -> list[Hook]:
        def pick(logits: Tensor, indices: Tensor) -> Tensor:
            return self.keys(layer, batch, logits.shape[-1]).topk(indices.shape[-1], dim=-1).indices

        return routed_by(self.setting.moe, layer, pick)

    def keys(self, layer: Layer, batch: Batch, n_experts: int) -> Tensor:
        """The numbers whose largest k decide, ``[batch, pos, expert]``."""
        return uniform_keys(batch.tokens, n_experts, self.setting.config.seed, *layer_labels(layer))


class RandomRouting(HashRouting):
    """k experts at random for every token, anew at every step; fixed by seed, step and the tokens so far."""

    name = "random"

    def keys(self, layer: Layer, batch: Batch, n_experts: int) -> Tensor:
        step = batch.step if batch.training else -1
        context = batch.tokens.cumsum(-1)
        position = torch.arange(context.shape[-1], device=context.device).expand_as(context)
        return uniform_keys(position, n_experts, context, self.setting.config.seed, step, *layer_labels(layer))


class CapacityDropping(Strategy):
    """In training an expert takes at most ceil(capacity_factor * k T / E) slots of a micro-batch; the rest are dropped.

    First choices come before second ones, earlier positions before later ones. The weights of what is left stay as they
    were. Combinable: ``micro_batch+capacity``, whose loss counts slots before they are dropped. Outside training
    nothing is dropped.
    """

    name = "capacity"

    def dropping_hooks(self, batch: Batch) -> list[Hook]:
        return [hook for layer in self.setting.layers for hook in self._capped(layer)] if batch.training else []

    def _capped(self, layer: Layer) -> list[Hook]:
        rule, kept = self.setting.moe.spec(layer).rule, dict[str, Tensor]()

        def pick(logits: Tensor, indices: Tensor) -> Tensor:
            kept["mask"] = within_capacity(indices, logits.shape[-1], self.setting.config.capacity_factor)
            kept["weights"] = rule.weights(logits, indices, are_valid=True)
            return indices.masked_fill(~kept["mask"], -1)

        return routed_by(self.setting.moe, layer, pick, lambda weights: kept["weights"] * kept["mask"])


def within_capacity(indices: Tensor, n_experts: int, factor: float) -> Tensor:
    """Which slots are within capacity. ``[batch, pos, slot] -> [batch, pos, slot]`` bool; empty slots never are."""
    n_tokens = indices.shape[0] * indices.shape[1]
    capacity = math.ceil(factor * indices.shape[2] * n_tokens / n_experts)
    order = indices.permute(2, 1, 0).reshape(-1)  # by slot, then position, then sequence
    one_hot = slots_taken(order.unsqueeze(-1), n_experts)
    rank = (one_hot.cumsum(0) * one_hot).sum(-1)
    kept = (rank >= 1) & (rank <= capacity)
    return kept.view(indices.shape[2], indices.shape[1], indices.shape[0]).permute(2, 1, 0)
