"""A layer's block computed by hand: from its experts' weights, one token and slot at a time, without any hook.

What the hooks show and what writing to them does is compared with this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_interp.arch.rules import RoutingRule
from moe_interp.arch.spec import MoESpec
from moe_interp.types import Layer
from moe_interp.verification.model_under_test import ModelUnderTest


class LayerByHand:
    """One layer on the tested model's tokens, made by :func:`layer_by_hand`; all tensors are flat, ``[token, ...]``.

    Attributes:
        rule: The layer's rule for the number format of its hidden states.
        router_in: What the router read.
        logits, indices, weights: What the untouched router replied, or handed to the experts; weights as applied.
        x: The experts' input.
        shared: The shared experts' part of the block's output, or None.
    """

    logits: Tensor
    indices: Tensor
    weights: Tensor
    shared: Tensor | None

    def __init__(self, spec: MoESpec, hidden: Tensor) -> None:
        self.spec = spec
        self.rule: RoutingRule = spec.rule_for(hidden.dtype)
        self.router_in = self.x = _flat(hidden)
        self.shared = None

    def replied(self, hidden: Tensor, output: object) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, experts and weights (as applied) of a reply of the router."""
        with self.spec.materialized(self.spec.router):
            return self.spec.family.layout.read(self.spec.router, self.rule, hidden, output)

    def reply(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the untouched router answers to other hidden states."""
        with self.spec.materialized(self.spec.router):
            return self.spec.router(hidden, *args, **kwargs)

    def neurons(self, indices: Tensor, weights: Tensor) -> Tensor:
        """``[token, slot, d_expert]`` after the activation; weights enter only where they scale the input."""
        rows = self.x.unsqueeze(1).expand(-1, indices.shape[1], -1)
        if self.spec.weight_on_input:
            rows = rows * weights.unsqueeze(-1).to(rows.dtype)
        with self.spec.reading_experts():
            return self._per_expert(self.spec.expert_functions.hidden, rows, indices, self.spec.d_expert)

    def outputs(self, neurons: Tensor, indices: Tensor) -> Tensor:
        """``[token, slot, d_model]``, before the weight; zero at empty slots."""
        with self.spec.reading_experts():
            found = self._per_expert(self.spec.expert_functions.output, neurons, indices, self.x.shape[-1])
            return found if self.spec.project is None else self.spec.project(found)

    def routed(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """``[token, d_model]``: the weighted sum over the slots, in single precision at least."""
        wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if not self.spec.weight_on_input:
            wide = wide * weights.unsqueeze(-1).to(wide.dtype)
        bias = self.spec.project_bias
        return wide.sum(dim=1) if bias is None else wide.sum(dim=1) + bias

    def routed_of(self, indices: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of a route; by the untouched experts module where its weights cannot be read."""
        if self.spec.unreadable is None:
            return self.routed(self.outputs(self.neurons(indices, weights), indices), weights)
        with self.spec.materialized(self.spec.experts):
            given = weights.masked_fill(indices < 0, 0.0).to(self.weights.dtype) / self.spec.block_scale
            return self.spec.experts(self.x, indices.clamp(min=0), given) * self.spec.block_scale

    def route(self, indices: Tensor, weights: Tensor) -> Tensor:
        """The block's output if these experts ran with these weights."""
        return self.block(self.routed_of(indices, weights), self.shared)

    def block(self, routed: Tensor, shared: Tensor | None) -> Tensor:
        """The block's output from its parts."""
        total = routed if shared is None or self.spec.family.shared_on_layer is not None else routed + shared
        bias = self.spec.output_bias
        return total if bias is None else total + bias

    def _per_expert(
        self, function: Callable[[Tensor, int], Tensor], rows: Tensor, indices: Tensor, width: int
    ) -> Tensor:
        flat, ids = rows.reshape(-1, rows.shape[-1]), indices.reshape(-1)
        found = flat.new_zeros(len(flat), width)
        for expert in ids[ids >= 0].unique().tolist():
            mine = (ids == expert).nonzero().flatten()
            found = found.index_copy(0, mine, function(flat[mine], expert).to(found.dtype))
        return found.view(*indices.shape, width)


def layer_by_hand(tested: ModelUnderTest, layer: Layer) -> LayerByHand:
    """A layer's values in the pass with nothing hooked. Runs the shared experts' gate, and some families' router."""
    spec, call = tested.specs[layer], tested.router_calls[layer]
    hand = LayerByHand(spec, call.args[0])
    hand.logits, indices, weights = (_flat(t) for t in hand.replied(call.args[0], call.output))
    if layer in tested.expert_calls:
        hand.x, indices, weights = (_flat(t) for t in tested.expert_calls[layer].args[:3])
        weights = weights if spec.block_scale == 1.0 else weights * spec.block_scale
    hand.indices, hand.weights = indices, weights
    if layer in tested.shared_calls:
        shared = tested.shared_calls[layer]
        with spec.materialized(spec.shared_gate):
            gate = 1.0 if spec.shared_gate is None else torch.sigmoid(spec.shared_gate(shared.args[0]))
        hand.shared = _flat(gate * shared.output)
    return hand


def _flat(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])
