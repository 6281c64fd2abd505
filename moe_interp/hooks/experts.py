"""The second opening of a forward pass: the experts, from the route to the block's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_interp.arch.grouped_experts import hidden_of_rows, output_of_rows
from moe_interp.arch.grouped_products import sort_by_expert
from moe_interp.errors import HookError
from moe_interp.hooks.edits import carries_gradient
from moe_interp.hooks.layer import LayerPass, Opened, OpenLayer
from moe_interp.hooks.router import fire_route, with_gradient

EXPERT_HOOKS = ("expert_post", "expert_out")


class OpenedExperts(Opened):
    """The experts module of a family that hands it ``(hidden, indices, weights)``."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        run = self.layer.running
        if run is None:
            return self.native_forward(*args, **kwargs)
        given = [*args, *kwargs.values()]
        if len(given) != 3 or not all(isinstance(value, Tensor) for value in given):
            kinds = ", ".join(type(value).__name__ for value in given)
            raise HookError(
                f"experts of the class {type(self.module).__name__} at layer {self.layer.spec.layer!r}, which are "
                f"handed ({kinds})",
                "experts that are handed the hidden states, the experts' ids and their weights",
                "Load the model unquantised (or dequantized), or take a newer transformers.",
            )
        return self._run(run, *given)

    def _run(self, run: LayerPass, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        layer = self.layer
        scale = layer.spec.block_scale
        shown = run.fold(weights) if scale == 1.0 else run.fold(weights) * scale
        run.has_empty = _may_be_empty(run, indices) and bool((indices < 0).any())
        new_indices, new_weights, changed = fire_route(layer, run, run.fold(indices), shown)
        if layer.is_hooked(*EXPERT_HOOKS) or (run.has_empty and layer.spec.unreadable is None):
            routed = sum_of_experts(layer, run, hidden)
            run.is_projected = layer.spec.family.latent is not None
        else:
            if changed:
                slots = new_indices.shape[-1]
                indices = new_indices.reshape(-1, slots)
                if run.has_empty:  # an empty slot has weight 0, whatever expert is named in it
                    indices = indices.clamp(min=0)
                written = _unscale(new_weights, scale).reshape(-1, slots)
                weights = written if run.is_edited else with_gradient(weights, written)
            routed = self.native_forward(hidden, indices, weights)
            if layer.spec.family.latent is not None or not layer.is_hooked("routed_out", "shared_out"):
                return routed
            routed = routed * scale if scale != 1.0 else routed
        if layer.spec.family.latent is None:
            routed = fire_block_outputs(layer, run, routed)
        return _unscale(routed, scale)


class OpenedProjection(Opened):
    """The projection from a latent width to d_model (Nemotron-H): passes what the experts have already projected."""

    def call(self, latent: Tensor) -> Tensor:
        run = self.layer.running
        if run is None:
            return self.native_forward(latent)
        if not run.is_projected:
            return fire_block_outputs(self.layer, run, self.native_forward(latent))
        bias = self.layer.spec.project_bias
        return fire_block_outputs(self.layer, run, latent if bias is None else latent + bias)


class OpenedShared(Opened):
    """The shared experts. Where a block calls them before the routed ones, their hook still fires after."""

    def call(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = self.native_forward(x, *args, **kwargs)
        if not self.layer.is_hooked("shared_out"):
            return out
        run = self.layer.running
        if run is not None and not run.routed_is_done:
            run.shared_in, run.shared_out = x, out
            return out
        folded = out if run is None else run.fold(out)
        return self.layer.fire("shared_out", folded).reshape(out.shape)


def fire_block_outputs(layer: OpenLayer, run: LayerPass, routed: Tensor) -> Tensor:
    """Fire ``routed_out``, and ``shared_out`` where the shared experts ran before."""
    shape = routed.shape
    routed = layer.fire("routed_out", run.fold(routed))
    run.routed_is_done = True
    if run.shared_out is not None:
        shared = run.fold(_gated(layer, run))
        new, edited = layer.fire_and_compare("shared_out", shared)
        if edited or carries_gradient(new):
            # the block adds its own shared output to this; only the edit is missing
            routed = routed + (new - shared)
    return routed.reshape(shape)


def _may_be_empty(run: LayerPass, indices: Tensor) -> bool:
    """Whether a slot may be empty before any hook of ours: by a capacity, or by a hook of TransformerLens' own."""
    is_routers = run.router_choice is not None and run.router_choice.is_unchanged(indices)
    return not is_routers or run.rule is None or run.rule.has_capacity


def sum_of_experts(layer: OpenLayer, run: LayerPass, hidden: Tensor) -> Tensor:
    """The weighted sum over the slots of the running route, firing the experts' hooks.

    Args:
        hidden: ``[token, d_in]``, the experts' input.

    Returns:
        ``[token, d_model]``.
    """
    assert run.indices is not None
    assert run.weights is not None
    spec, slots = layer.spec, run.indices.shape[-1]
    weights = run.weights.reshape(-1, slots)
    out = _expert_outputs(layer, run, hidden, run.indices.reshape(-1, slots), weights)
    if not spec.weight_on_input:
        out = out * weights.unsqueeze(-1)
    return out.sum(dim=1).to(hidden.dtype)


def _expert_outputs(layer: OpenLayer, run: LayerPass, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Each slot's expert output ``[token, slot, d_model]``; zero at empty slots."""
    spec = layer.spec
    n_tokens, slots = indices.shape
    # pairs of a token and one of its slots, sorted by expert; empty slots come last and give zero
    order, groups = sort_by_expert(indices.reshape(-1), spec.n_experts)
    rows = hidden[order // slots]
    if spec.weight_on_input:
        rows = rows * weights.reshape(-1)[order].unsqueeze(-1).to(rows.dtype)

    def fired(name: str, pairs: Tensor, width: int) -> Tensor:
        # shape: (pair, width), sorted -> (batch, pos, slot, width)
        full = pairs.new_empty(pairs.shape).index_copy_(0, order, pairs).view(run.batch, run.pos, slots, width)
        return layer.fire(name, full, owned=True).reshape(n_tokens * slots, width)

    with spec.reading_experts():
        experts, project = spec.expert_functions, spec.project
        neurons = hidden_of_rows(experts, rows, groups)
        if layer.is_hooked("expert_post"):
            neurons = fired("expert_post", neurons, experts.d_expert)[order]
        outputs = output_of_rows(experts, neurons, groups, hidden.shape[-1])
        outputs = outputs if project is None else project(outputs)
    return fired("expert_out", outputs, outputs.shape[-1]).view(n_tokens, slots, -1)


def _gated(layer: OpenLayer, run: LayerPass) -> Tensor:
    assert run.shared_out is not None
    assert run.shared_in is not None
    gate = layer.spec.shared_gate
    return run.shared_out if gate is None else torch.sigmoid(gate(run.shared_in)) * run.shared_out


def _unscale(value: Tensor, scale: float) -> Tensor:
    return value if scale == 1.0 else value / scale
