"""Writing routes together with their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_interp.arch.routing_rule import widen
from moe_interp.hooks.attach import MoEHooks
from moe_interp.interventions.positions import TokenSelection, merge_slots, merge_weights
from moe_interp.types import EMPTY, Hooks, Layer


class RouteWriter:
    """Writes routes on tokens and, where they are still what runs, their weights.

    Of several interventions on a token the last one's route runs; then the weights that an earlier one had for its own
    route are dropped.

    Args:
        moe: Attached hooks.
        layer: An MoE layer.
        selection: The tokens.
        route: From the present route ``[batch, pos, slot]`` to the new one.
        weigh: From the present weights to the new ones, both ``[batch, pos, slot]``; the family's own without it.
    """

    def __init__(
        self,
        moe: MoEHooks,
        layer: Layer,
        selection: TokenSelection,
        route: Callable[[Tensor], Tensor],
        weigh: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.moe, self.layer, self.selection, self.route, self.weigh = moe, layer, selection, route, weigh

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
        written = run.notes[self] = merge_slots(tokens, self.route(value), value)
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
