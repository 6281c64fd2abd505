"""Writing routes together with their weights, and what is asked of them by an expert's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_interp.arch.routing_rule import widen
from moe_interp.errors import RouteError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.layer import LayerPass
from moe_interp.interventions.positions import TokenSelection, merge_slots, merge_weights
from moe_interp.slots import NATIVE
from moe_interp.types import EMPTY, Hooks, Layer


class RouteWriter:
    """Writes routes on tokens and, where they are still what runs, their weights.

    Of several interventions on a token the last one's route runs; then the weights that an earlier one had for its own
    route are dropped.

    Args:
        moe: Attached hooks.
        layer: An MoE layer.
        selection: The tokens.
        route: From the present route ``[batch, pos, slot]`` to the new one; ``NATIVE`` where the token keeps its own.
        weigh: From the present weights to the new ones, both ``[batch, pos, slot]``; the family's own without it.
        is_named: The route's experts were named one by one: no later intervention may take one away as if by chance.
    """

    def __init__(
        self,
        moe: MoEHooks,
        layer: Layer,
        selection: TokenSelection,
        route: Callable[[Tensor], Tensor],
        weigh: Callable[[Tensor], Tensor] | None = None,
        is_named: bool = False,
    ) -> None:
        self.moe, self.layer, self.selection, self.route, self.weigh = moe, layer, selection, route, weigh
        self.is_named = is_named

    @property
    def hooks(self) -> Hooks:
        hooks: Hooks = [(self.moe.hook_name("expert_indices", self.layer), self.set_indices)]
        if self.weigh is None:
            return hooks
        return [*hooks, (self.moe.hook_name("expert_weights", self.layer), self.set_weights)]

    def set_indices(self, value: Tensor, hook: Any) -> Tensor:
        tokens, run = self.selection.tokens(value), self.moe.running(self.layer)
        if not bool(tokens.any()):
            return value
        new = self.route(value)
        tokens = tokens & (new != NATIVE).all(dim=-1)
        if not bool(tokens.any()):
            return value
        written = run.notes[self] = merge_slots(tokens, new, value)
        note_route(run, tokens, written, self.is_named)
        before = torch.zeros_like(tokens, dtype=torch.int64) if run.writer is None else run.writer
        run.writer = before.masked_fill(tokens, id(self))
        return written

    def set_weights(self, value: Tensor, hook: Any) -> Tensor:
        assert self.weigh is not None
        kept = self.kept(value)
        return value if kept is None else merge_weights(kept, self.weigh(value), value)

    def kept(self, value: Tensor) -> Tensor | None:
        """``[batch, pos]``: the tokens whose written route is the one that runs; None if nothing was written."""
        run = self.moe.running(self.layer)
        written = run.notes.get(self)
        if written is None:
            return None
        assert run.indices is not None
        width = max(run.indices.shape[-1], written.shape[-1])
        mine, final = (widen(route, width, EMPTY) for route in (written, run.indices))
        return (run.writer == id(self)) & (mine == final).all(dim=-1)


@dataclass(eq=False)
class Demands:
    """Of every token of a pass, which experts its route must and must not have.

    Attributes:
        layer: The layer, for errors.
        promoted, banned: ``[batch, pos, expert]``, by ``promote_experts`` and ``suppress_experts``.
        forced: Those of the last route that ``force_experts`` or ``set_routes`` wrote.
        budget: ``[batch, pos]``, experts a token by ``change_top_k``; 0 where it says nothing.
        raised: ``[batch, pos, expert]``, the margins added to what experts are ranked by; None before the first.
    """

    layer: Layer
    promoted: Tensor
    banned: Tensor
    forced: Tensor
    budget: Tensor
    raised: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """Experts that an intervention asked for by name."""
        return self.promoted | self.forced


_WRITTEN = "routes written by name"  # in Pass.notes: [(tokens, their experts or None)], until demands are asked for


def demands_of(run: LayerPass, layer: Layer) -> Demands:
    """The running pass's demands; those of routes that were written before are among them."""
    demands = run.notes.get(Demands)
    if demands is None:
        assert run.logits is not None
        none = torch.zeros(run.logits.shape, dtype=torch.bool, device=run.logits.device)
        budget = torch.zeros(none.shape[:2], dtype=torch.int64, device=none.device)
        demands = run.notes[Demands] = Demands(layer, none, none, none, budget)
    for tokens, experts in run.notes.pop(_WRITTEN, []):
        named = torch.zeros_like(demands.forced) if experts is None else members(experts, demands.forced.shape[-1])
        demands.forced = torch.where(tokens.unsqueeze(-1), named, demands.forced)
    return demands


def note_route(run: LayerPass, tokens: Tensor, route: Tensor, is_named: bool) -> None:
    """A route is written on tokens by other means than ranks.

    Raises:
        RouteError: it leaves out an expert that was promoted before, or has one that was suppressed.
    """
    run.notes.setdefault(_WRITTEN, []).append((tokens, route if is_named else None))
    demands = run.notes.get(Demands)
    if demands is None:
        return
    demands.budget = demands.budget.masked_fill(tokens, 0)
    has = members(route, demands.banned.shape[-1])
    asked = tokens.unsqueeze(-1)
    for wrong, was, by in (
        (demands.promoted & ~has & asked, "promoted", "leaves it out"),
        (demands.banned & has & asked, "suppressed", "sends the token to it"),
    ):
        if bool(wrong.any()):
            raise contradiction(demands.layer, wrong, was, f"an intervention after that {by}")


def contradiction(layer: Layer, wrong: Tensor, was: str, then: str) -> RouteError:
    """Two interventions that ask for opposites, at the first of ``wrong``, ``[batch, pos, expert]``."""
    row, pos, expert = wrong.nonzero()[0].tolist()
    return RouteError(
        f"expert {expert} of layer {layer!r} is {was} for sequence {row}, position {pos} of the pass, and {then}",
        "interventions that can all have their way with a token",
        "Leave one out, or give them different positions; promote_experts and suppress_experts come after what writes "
        "whole routes. The model was left as it was.",
    )


def members(route: Tensor, n_experts: int) -> Tensor:
    """``[..., slot]`` to ``[..., expert]``: which experts a route has."""
    found = torch.zeros(*route.shape[:-1], n_experts + 1, dtype=torch.bool, device=route.device)
    return found.scatter_(-1, route.masked_fill(route < 0, n_experts).long(), True)[..., :n_experts]
