"""Pairs of prompts on attached tiny models, and sweeps as plain loops of run_with_hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_interp.hooks.attach import MoEHooks
from moe_interp.types import Hooks
from tests import tiny

N_POS, CHANGED = 9, slice(3, 5)


@dataclass(frozen=True, eq=False)
class Pair:
    """A clean and a corrupted batch: three examples, unpadded, padded on the left, padded on the right."""

    moe: MoEHooks
    clean: Tensor
    corrupted: Tensor
    mask: Tensor
    logits: Tensor
    cache: Any

    @property
    def first(self) -> list[int]:
        return self.mask.long().argmax(dim=1).tolist()

    @property
    def lengths(self) -> list[int]:
        return self.mask.sum(dim=1).tolist()

    def metric(self, logits: Tensor) -> Tensor:
        """Log-probability of a token after each example's last real one, in nats."""
        last = torch.tensor(self.first) + self.mask.sum(dim=1) - 1
        return logits[torch.arange(len(last)), last].log_softmax(dim=-1)[:, 5]

    def plain(self) -> Tensor:
        return self.metric(self.moe.bridge(self.corrupted, attention_mask=self.mask))

    def patched(self, name: str, layer: Any, write: Callable[[Tensor], Any]) -> Tensor:
        """The metric with one hook."""
        hooks: Hooks = [(self.moe.hook_name(name, layer), lambda value, hook: write(value))]
        return self.metric(self.moe.bridge.run_with_hooks(self.corrupted, attention_mask=self.mask, fwd_hooks=[*hooks]))

    def columns(self, pos: int) -> list[tuple[int, int]]:
        """``(example, column)`` of a position in the unpadded prompts; examples that are too short are left out."""
        return [(b, f + pos) for b, (f, n) in enumerate(zip(self.first, self.lengths)) if pos < n]

    def seen(self, name: str, layer: Any) -> tuple[Tensor, Tensor]:
        """An activation in the clean and in the corrupted run."""
        _, cache = self.moe.bridge.run_with_cache(
            self.corrupted, attention_mask=self.mask, names_filter=self.moe.filter(name, layers=[layer])
        )
        return self.moe.cached(self.cache, name, layer), self.moe.cached(cache, name, layer)


def pair(moe: MoEHooks) -> Pair:
    clean = tiny.random_tokens(3, N_POS)
    corrupted = clean.clone()
    corrupted[:, CHANGED] = tiny.random_tokens(3, CHANGED.stop - CHANGED.start, seed=5)
    mask = torch.ones_like(clean)
    mask[1, :2], mask[2, -3:] = 0, 0
    logits, cache = moe.bridge.run_with_cache(clean, attention_mask=mask)
    return Pair(moe, clean, corrupted, mask, logits, cache)


def token_cell(given: Pair, name: str, layer: Any, pos: int) -> Tensor:
    """One position of one activation ``[batch, pos, width]``, by hand."""
    clean = given.moe.cached(given.cache, name, layer)

    def write(value: Tensor) -> Tensor:
        for row, column in given.columns(pos):
            value[row, column] = clean[row, column]
        return value

    return given.patched(name, layer, write)


def route_cell(given: Pair, layer: Any, pos: int, own_weights: bool) -> Tensor:
    moe = given.moe
    hooks: Hooks = []
    for name in ("expert_indices", "expert_weights")[: 1 if own_weights else 2]:
        clean = moe.cached(given.cache, name, layer)

        def write(value: Tensor, hook: Any, clean: Tensor = clean) -> Tensor:
            for row, column in given.columns(pos):
                value[row, column] = clean[row, column]
            return value

        hooks.append((moe.hook_name(name, layer), write))
    return given.metric(moe.bridge.run_with_hooks(given.corrupted, attention_mask=given.mask, fwd_hooks=[*hooks]))


def expert_cell(given: Pair, layer: Any, expert: int) -> Tensor:
    """An expert's output where both runs use it, slot by slot, by hand."""
    ours, theirs = given.seen("expert_indices", layer)
    clean = given.moe.cached(given.cache, "expert_out", layer)

    def write(value: Tensor) -> Tensor:
        for row in range(len(value)):
            for column in range(given.first[row], given.first[row] + given.lengths[row]):
                for slot, used in enumerate(theirs[row, column].tolist()):
                    there = (ours[row, column] == expert).nonzero().flatten().tolist()
                    if used == expert and there:
                        value[row, column, slot] = clean[row, column, there[0]]
        return value

    return given.patched("expert_out", layer, write)


def contribution_change(given: Pair, layer: Any, expert: int) -> Tensor:
    """An expert's weighted output in the clean run minus that in the corrupted one, ``[batch, pos, d_model]``."""
    on_input = given.moe.spec(layer).weight_on_input
    runs = [given.seen(name, layer) for name in ("expert_indices", "expert_weights", "expert_out")]

    def contribution(run: int, row: int, column: int) -> Any:
        indices, weights, outputs = (values[run][row, column] for values in runs)
        chosen = (indices == expert).nonzero().flatten().tolist()
        return sum(outputs[slot] * (1.0 if on_input else weights[slot]) for slot in chosen)

    change = torch.zeros_like(given.moe.cached(given.cache, "routed_out", layer))
    for row in range(len(change)):
        for column in range(given.first[row], given.first[row] + given.lengths[row]):
            change[row, column] += contribution(0, row, column) - contribution(1, row, column)
    return change


def contribution_cell(given: Pair, layer: Any, expert: int) -> Tensor:
    change = contribution_change(given, layer, expert)
    return given.patched("routed_out", layer, lambda value: value + change)


def slot_cell(given: Pair, layer: Any, pos: int, slot: int) -> Tensor:
    clean = given.moe.cached(given.cache, "expert_out", layer)

    def write(value: Tensor) -> Tensor:
        for row, column in given.columns(pos):
            value[row, column, slot] = clean[row, column, slot]
        return value

    return given.patched("expert_out", layer, write)
