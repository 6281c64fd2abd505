"""What every file here uses: attached bridges of tiny models, and calls with what a family needs beside its tokens."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from moe_interp.hooks.attach import MoEHooks, attach
from tests import tiny

TOKENS = tiny.random_tokens(2, 8)


@cache
def _built(name: str) -> TransformerBridge:
    return tiny.build_bridge(tiny.build_hf(name), name)


def build(name: str) -> TransformerBridge:
    """A fresh bridge: a copy, which takes a quarter of the time of building one."""
    return copy.deepcopy(_built(name))


def attach_to(name: str, **options: Any) -> MoEHooks:
    return attach(build(name), **options)


@torch.no_grad()
def logits_of(bridge: TransformerBridge, name: str, tokens: Tensor = TOKENS, **options: Any) -> Tensor:
    return bridge(tokens, **tiny.model_inputs(name, tokens), **options)


@torch.no_grad()
def cache_of(moe: MoEHooks, name: str, *hooks: str, tokens: Tensor = TOKENS, **options: Any) -> dict[str, Tensor]:
    """Activations by full hook name; of every hook by default."""
    inputs = tiny.model_inputs(name, tokens)
    return moe.bridge.run_with_cache(tokens, names_filter=moe.filter(*hooks), **inputs, **options)[1].cache_dict


@torch.no_grad()
def run_hooked(moe: MoEHooks, name: str, hooks: list[Any], tokens: Tensor = TOKENS, **options: Any) -> Tensor:
    return moe.bridge.run_with_hooks(tokens, fwd_hooks=hooks, **tiny.model_inputs(name, tokens), **options)


def largest_difference(left: Tensor, right: Tensor) -> float:
    return float((left - right).detach().abs().max())


def negate(activation: Tensor, hook: Any) -> Tensor:
    """An edit of router logits that re-routes nearly every token, whatever the rule (a large shift saturates some)."""
    return -activation
