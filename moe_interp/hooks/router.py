"""The first opening of a forward pass: the router, from its input to the route it hands on.

Whether a hook has edited an activation is told by ``edits.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_interp.arch.captured_logits import CapturedLogits
from moe_interp.arch.routing_rule import keep_unchanged
from moe_interp.arch.rules import HashTable, RoutingRule, SparseMixer
from moe_interp.errors import RouteError
from moe_interp.hooks.edits import VersionedTensor, carries_gradient, counting_copy
from moe_interp.hooks.layer import LayerPass, Opened, OpenLayer


class OpenedRouter(Opened):
    """Runs the family's own router; re-routes by its rule where a hook reads or writes what comes before selection."""

    def call(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        run, spec = self.layer.running, self.layer.spec
        if run is None:
            return self.native_forward(hidden, *args, **kwargs)
        read = self._hooked_input(run, hidden)
        may_jitter = read is not hidden and self.module.training
        state, given = (_random_state(hidden.device), VersionedTensor(read)) if may_jitter else (None, None)
        run.rule, layout = spec.rule_for(hidden.dtype), spec.family.layout
        out, captured = self._native(read, args, kwargs, run.rule.n_experts if layout.captures_logits else None)
        if state is not None and given is not None and not given.is_unchanged(read):
            self._jitter(hidden, state, args, kwargs)
        flat_logits, *route = layout.read(self.module, run.rule, read, out, captured)
        leading = flat_logits.shape[:-1]
        logits, indices, weights = run.fold(flat_logits), run.fold(route[0]), run.fold(route[1])
        indices, weights, changed = self._reroute(run, run.rule, logits, indices, weights)
        if spec.family.routes_at_router:
            indices, weights, edited = fire_route(self.layer, run, indices, weights)
            changed = changed or edited
        if changed:
            assert run.logits is not None
            scores = None if run.scores is None else run.scores.reshape(*leading, -1)
            flat = (indices.reshape(*leading, -1), weights.reshape(*leading, -1))
            flat_logits = run.logits.reshape(*leading, -1)
            written = layout.write(run.rule, flat_logits, scores, flat, out, same_route=not run.is_edited)
            out = written if run.is_edited else _as_returned(out, written)
        run.router_choice = VersionedTensor(out[layout.choice])
        return out

    def _native(
        self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], n_captured: int | None
    ) -> tuple[Any, Tensor | None]:
        """What the family's own router returns, and its raw logits where their width is given to listen for."""
        if n_captured is None:
            return self.native_forward(hidden, *args, **kwargs), None
        with CapturedLogits(self.module, n_captured) as capture:
            out = self.native_forward(hidden, *args, **kwargs)
        return out, capture.logits

    def _hooked_input(self, run: LayerPass, hidden: Tensor) -> Tensor:
        """What the router reads: the block's own tensor, unless a hook edited it or its gradient must arrive."""
        if not self.layer.is_hooked("router_in"):
            return hidden
        new, edited = self.layer.fire_and_compare("router_in", run.fold(hidden))
        if not (edited or carries_gradient(new)):
            return hidden
        # in training some routers write their jitter into their input, and the hook's tensor is not theirs to write to
        new = new.reshape(hidden.shape)
        return counting_copy(new) if self.module.training else new

    def _jitter(self, hidden: Tensor, state: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let a router that writes its jitter into its input write it into the block's as well, where experts read.

        The same random numbers are drawn twice, and the generator is left as one call leaves it.
        """
        after = _random_state(hidden.device)
        _set_random_state(hidden.device, state)
        self.native_forward(hidden, *args, **kwargs)
        _set_random_state(hidden.device, after)

    def _reroute(
        self, run: LayerPass, rule: RoutingRule, logits: Tensor, indices: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, bool]:
        """Fire the hooks before selection; select anew where they edited, carry a gradient where one must arrive."""
        run.logits, edited = self.layer.fire_and_compare("router_logits", logits)
        changed = self._differentiates(rule, run.logits, "router_logits")
        if edited:
            indices, weights = _route(rule, run.logits, indices)
            run.is_edited = True
        elif changed:
            weights = with_gradient(weights, rule.weights(run.logits, indices, are_valid=True))
        if self.layer.is_hooked("router_probs"):
            scores = rule.scores(run.logits)
            assert scores is not None
            new, edited = self.layer.fire_and_compare("router_probs", scores)
            if edited:
                run.scores, run.is_edited = new, True
                indices, weights = _route_scores(rule, new, indices)
            elif self._differentiates(rule, new, "router_probs"):
                run.scores, changed = new, True
                weights = with_gradient(weights, rule.weights_from_scores(new, indices, are_valid=True))
        if run.is_edited:
            check_weights(weights, self.layer)
        return indices, weights, changed or run.is_edited

    def _differentiates(self, rule: RoutingRule, value: Tensor, name: str) -> bool:
        """Whether the route must be recomputed from the hooked tensor so that its gradient arrives."""
        random_choice = isinstance(rule, SparseMixer) and self.module.training
        return self.layer.is_hooked(name) and carries_gradient(value) and not random_choice


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def with_gradient(value: Tensor, carrier: Tensor) -> Tensor:
    """``value`` bit for bit, with the gradient of ``carrier``, which differs from it by rounding at most."""
    return value.detach() + (carrier - carrier.detach()).to(value.dtype)


def _as_returned(out: tuple[Any, ...], written: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a router returned, bit for bit, with the gradients of what it would return for the hooked tensors."""
    carries = [isinstance(new, Tensor) and carries_gradient(new) for new in written]
    return tuple(with_gradient(old, new) if c else old for old, new, c in zip(out, written, carries))


def fire_route(layer: OpenLayer, run: LayerPass, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Fire ``expert_indices`` and ``expert_weights``: the route that runs, and whether a hook had a part in it."""
    new_indices, changed = layer.fire_and_compare("expert_indices", indices)
    if changed:
        weights = _reweigh(layer, run, indices, weights, new_indices)
        run.has_empty = bool((new_indices < 0).any())
    run.indices = new_indices
    new_weights, edited = layer.fire_and_compare("expert_weights", weights)
    changed = changed or edited
    run.is_edited = run.is_edited or changed
    if new_weights is not weights:
        changed = changed or carries_gradient(new_weights)
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


def _reweigh(layer: OpenLayer, run: LayerPass, old: Tensor, weights: Tensor, new: Tensor) -> Tensor:
    """The rule's weights for edited routes; routes that are as they were keep theirs bit for bit."""
    ruled = run.family_weights(new)
    check_weights(ruled, layer)
    return keep_unchanged(ruled, weights, old, new)
