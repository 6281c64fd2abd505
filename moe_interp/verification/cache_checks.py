"""The check of passes that continue a cached prefix: how many positions they find there, and that reading is free."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from moe_interp.engine.memory import is_out_of_memory
from moe_interp.verification.finding import Finding, excepted
from moe_interp.verification.model_under_test import ModelUnderTest, difference


def past_is_counted(tested: ModelUnderTest) -> Iterator[Finding]:
    """The tokens in three chunks, each after the ones before it: ``n_past`` is the number of tokens fed so far."""
    counted, read = "positions in the cache are counted", "reading changes nothing with a cache"
    layer, hook = tested.layers[0], "expert_indices"
    why = why_no_cache(tested)
    if why is not None:
        yield excepted(counted, layer, hook, why)
        return
    plain = torch.cat(list(in_chunks(tested)), dim=1)
    found: list[int] = []
    name = tested.moe.hook_name(hook, layer)
    with tested.moe.bridge.hooks(fwd_hooks=[(name, lambda value, hook: found.append(tested.moe.n_past))]):
        hooked = torch.cat(list(in_chunks(tested)), dim=1)
    expected = [first for first, _ in chunks(tested.tokens)]
    figure = float(max(abs(n - m) for n, m in zip(found, expected))) if len(found) == len(expected) else float("inf")
    yield Finding(check=counted, layer=layer, hook=hook, figure=figure, note=f"{found} of {expected}")
    yield Finding(check=read, layer=layer, hook=hook, figure=difference(hooked, plain), bound=tested.noise)


def why_no_cache(tested: ModelUnderTest) -> str | None:
    """Why the model does not continue a cached prefix of these tokens; None where it does."""
    if isinstance(tested.layers[0], tuple):
        return "an encoder-decoder has no prompt that its cache continues"
    if tested.tokens.shape[1] < 2:
        return "a single token has no past"
    try:
        list(in_chunks(tested))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # with nothing hooked: the model's own limit
        return f"the model does not continue a cached prefix ({type(error).__name__})"
    return None


def in_chunks(tested: ModelUnderTest) -> Iterator[Tensor]:
    """The logits of each chunk, one pass a chunk."""
    bridge = tested.moe.bridge
    config: Any = bridge.original_model.config
    cache = DynamicCache(config=config)
    for first, end in chunks(tested.tokens):
        out = bridge(tested.tokens[:, first:end], past_key_values=cache)
        yield out[0] if isinstance(out, tuple) else out


def chunks(tokens: Tensor) -> list[tuple[int, int]]:
    """Where chunks begin and end: one half, most of the other, the last token."""
    n = tokens.shape[1]
    cuts = sorted({0, n // 2, n - 1, n})
    return list(itertools.pairwise(cuts))
