"""The check of ``moe.verify()`` that an intervention at an absolute position touches that token, also with a cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe_interp.arch.routing_rule import widen
from moe_interp.hooks.attach import MoEHooks
from moe_interp.interventions.force import set_routes
from moe_interp.types import EMPTY, Hooks, Layer
from moe_interp.verification.cache_checks import in_chunks, why_no_cache
from moe_interp.verification.finding import Finding, excepted
from moe_interp.verification.model_under_test import ModelUnderTest

CHECK, HOOK = "a position is its token, with a cache", "expert_indices"


def edits_touch_their_token(tested: ModelUnderTest) -> Iterator[Finding]:
    """Other experts at one position, of tokens that run in three chunks on a cache: these run there and nowhere else.

    The figure is the number of tokens whose route is not as it should be, over two positions: the first of the second
    chunk, and the last.
    """
    moe, n = tested.moe, tested.tokens.shape[1]
    refusal = why_no_cache(tested)
    for layer in tested.layers:
        why = "there is one expert" if tested.specs[layer].n_experts == 1 else refusal
        if why is not None or not isinstance(moe, MoEHooks):
            yield excepted(CHECK, layer, HOOK, why or "there are no hooks to intervene at")
            continue
        natural = _routes(tested, layer, [])
        # one of several experts, or the next one
        other = natural[..., :1] if natural.shape[-1] > 1 else (natural + 1) % tested.specs[layer].n_experts
        wrong = 0
        for position in sorted({n // 2, n - 1}):
            run = _routes(tested, layer, set_routes(moe, layer, other, positions=[position]))
            is_there = torch.arange(n, device=run.device).unsqueeze(-1) == position
            expected = torch.where(is_there, widen(other, natural.shape[-1], EMPTY), natural)
            wrong += int((run != expected).any(dim=-1).sum())
        yield Finding(check=CHECK, layer=layer, hook=HOOK, figure=float(wrong))


def _routes(tested: ModelUnderTest, layer: Layer, hooks: Hooks) -> Tensor:
    """The routes ``[batch, pos, slot]`` that run in the chunks, with empty slots at the end."""
    found: list[Tensor] = []

    def read(value: Tensor, hook: Any) -> None:
        found.append(value.clone())

    with tested.moe.bridge.hooks(fwd_hooks=[*hooks, (tested.moe.hook_name(HOOK, layer), read)]):
        list(in_chunks(tested))
    widest = max(value.shape[-1] for value in found)
    return torch.cat([widen(value, widest, EMPTY) for value in found], dim=1)
