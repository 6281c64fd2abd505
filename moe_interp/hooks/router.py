"""The first opening of a forward pass: the router, from its input to the route it hands on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_interp.arch.rules import HashTable, RoutingRule, SparseMixer
from moe_interp.errors import RouteError
from moe_interp.hooks.layer import OpenLayer, Pass, carries_gradient, is_edited


class OpenedRouter:
    """Runs the family's own router; re-routes by its rule where a hook reads or writes what comes before selection."""

    def __init__(self, layer: OpenLayer, native_forward: Any) -> None:
        self.layer, self.native_forward = layer, native_forward

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        run, spec = self.layer.running, self.layer.spec
        if run is None:
            return self.native_forward(hidden, *args, **kwargs)
        if self.layer.is_hooked("router_in"):
            folded = run.fold(hidden)
            new = self.layer.fire("router_in", folded)
            # unedited, the block's own tensor goes on: in training some routers write their jitter into it
            if is_edited(new, folded) or carries_gradient(new):
                hidden = new.reshape(hidden.shape)
        out = self.native_forward(hidden, *args, **kwargs)
        run.rule = spec.rule_for(hidden.dtype)
        flat_logits, *route = spec.family.layout.read(spec.router, run.rule, hidden, out)
        leading = flat_logits.shape[:-1]
        logits, indices, weights = run.fold(flat_logits), run.fold(route[0]), run.fold(route[1])
        indices, weights, changed = self._reroute(run, run.rule, logits, indices, weights)
        if spec.family.own_block:
            indices, weights, edited = choose(self.layer, run, indices, weights)
            changed = changed or edited
        if changed:
            assert run.logits is not None
            scores = None if run.scores is None else run.scores.reshape(*leading, -1)
            flat = (indices.reshape(*leading, -1), weights.reshape(*leading, -1))
            out = spec.family.layout.write(run.rule, run.logits.reshape(*leading, -1), scores, flat, out)
        run.handed_on = out
        return out

    def _reroute(
        self, run: Pass, rule: RoutingRule, logits: Tensor, indices: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, bool]:
        """Fire the hooks before selection, and select anew where they edited or must carry a gradient."""
        run.logits = self.layer.fire("router_logits", logits)
        edited = is_edited(run.logits, logits)
        rerouted = edited or self._differentiates(rule, run.logits, "router_logits")
        if rerouted:
            indices, weights = _route(rule, run.logits, indices)
        if self.layer.is_hooked("router_probs"):
            scores = rule.scores(run.logits)
            assert scores is not None
            new = self.layer.fire("router_probs", scores)
            changed = is_edited(new, scores)
            if changed or self._differentiates(rule, new, "router_probs"):
                run.scores = new
                indices, weights = _route_scores(rule, new, indices)
                rerouted, edited = True, edited or changed
        if edited:
            check_weights(weights, self.layer)
        return indices, weights, rerouted

    def _differentiates(self, rule: RoutingRule, value: Tensor, name: str) -> bool:
        """Whether the route must be recomputed from the hooked tensor so that its gradient arrives."""
        random_choice = isinstance(rule, SparseMixer) and self.layer.spec.router.training
        return self.layer.is_hooked(name) and carries_gradient(value) and not random_choice


def choose(layer: OpenLayer, run: Pass, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Fire ``expert_indices`` and ``expert_weights``: the route that runs, and whether a hook had a part in it."""
    new_indices = layer.fire("expert_indices", indices)
    changed = is_edited(new_indices, indices)
    if changed:
        weights = _reweigh(layer, run, indices, weights, new_indices)
    run.indices = new_indices
    new_weights = layer.fire("expert_weights", weights)
    if new_weights is not weights:
        changed = changed or is_edited(new_weights, weights) or carries_gradient(new_weights)
        new_weights = new_weights.masked_fill(new_indices < 0, 0.0)
    run.weights = new_weights
    return new_indices, new_weights, changed


def check_weights(weights: Tensor, layer: OpenLayer) -> None:
    """Refuse an edit of the router that leaves a token without numbers for weights."""
    bad = ~torch.isfinite(weights)
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        raise RouteError(
            f"the edited router of layer {layer.spec.layer} gives weight {weights[tuple(place)].item()} "
            f"at batch {place[0]}, pos {place[1]}",
            "logits that leave finite weights: at least as many finite logits as experts per token",
            "Mend the edit; the model was left as it was.",
        )


def _route(rule: RoutingRule, logits: Tensor, native_indices: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(rule, HashTable):
        return native_indices, rule.weights(logits, native_indices)
    return rule.route(logits)


def _route_scores(rule: RoutingRule, scores: Tensor, native_indices: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(rule, HashTable):
        return native_indices, rule.weights_from_scores(scores, native_indices)
    return rule.route_scores(scores)


def _reweigh(layer: OpenLayer, run: Pass, old: Tensor, weights: Tensor, new: Tensor) -> Tensor:
    """The rule's weights for edited routes; routes that are as they were keep theirs bit for bit."""
    ruled = run.family_weights(new)
    check_weights(ruled, layer)
    slots = max(old.shape[-1], new.shape[-1])
    same = (_widen(old, slots, -1) == _widen(new, slots, -1)).all(dim=-1, keepdim=True)
    kept = _widen(weights, slots, 0.0)[..., : new.shape[-1]]
    return torch.where(same, kept, ruled.to(weights.dtype))


def _widen(values: Tensor, slots: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, slots - values.shape[-1]), value=fill)
