"""The model's own fused attention, where nobody looks inside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import AttentionBridge

from moe_interp.arch.modules import unwrap
from moe_interp.engine.policy import policy_of
from moe_interp.engine.replaced_forward import swapped_forward
from moe_interp.hooks.attach import MoEHooks


def can_fuse(moe: MoEHooks) -> bool:
    """Whether the model knows fused attention and no hook point inside any attention is in use."""
    model: Any = moe.bridge.original_model
    attentions = _attentions(moe)
    hooked = any(m.has_hooks() for a in attentions for m in a.modules() if isinstance(m, HookPoint))
    is_known = policy_of(moe).fused_tolerance is not None and bool(getattr(model, "_supports_sdpa", False))
    return bool(attentions) and is_known and not hooked


@contextmanager
def fused_attention(moe: MoEHooks) -> Iterator[None]:
    """Inside the ``with``, attention runs as transformers' scaled dot product.

    TransformerLens computes attention step by step, so that its parts can be hooked. The two agree to rounding, except
    in models whose fused path leaves something out (a soft-cap, say): compare before use.
    """
    model: Any = moe.bridge.original_model
    configs: dict[int, Any] = {}
    for config in (model.config, *map(_config, _attentions(moe))):
        configs |= {id(c): c for c in _with_parts(config)}
    before = {key: config._attn_implementation for key, config in configs.items()}
    with ExitStack() as stack:
        for attention in _attentions(moe):
            stack.enter_context(swapped_forward(attention, unwrap(attention).forward))
        try:
            for config in configs.values():
                config._attn_implementation = "sdpa"
            yield
        finally:
            for key, config in configs.items():  # a whole before its parts, which it sets too
                config._attn_implementation = before[key]


@contextmanager
def attention_function(moe: MoEHooks, name: str) -> Iterator[None]:
    """Inside the ``with``, the model's attentions, and no other's, call a function of transformers' table.

    Each reads its name in a config, which other models and the making of masks may read as well: so each gets a copy.
    """
    with ExitStack() as stack:
        for attention in _attentions(moe):
            native: Any = unwrap(attention)
            stack.enter_context(swapped_forward(attention, native.forward))
            if (config := getattr(native, "config", None)) is not None:
                own = copy.copy(config)
                own._attn_implementation = name
                stack.callback(setattr, native, "config", config)
                native.config = own
        yield


@contextmanager
def queried_only_at(block: nn.Module, place: Tensor) -> Iterator[None]:
    """Inside the ``with``, a block's queries and its attention's output are computed at some positions, else zero.

    Keys and values stay whole, so what is computed equals a full pass there. For fused attention only: hooks inside
    would see the zeros.

    Args:
        block: A TransformerLens block; one without attention stays as it is.
        place: ``[read]`` positions in the flattened token matrix.
    """
    with ExitStack() as stack:
        for attention in (m for m in block.modules() if isinstance(m, AttentionBridge)):
            for name in ("q", "o"):
                if (part := attention._modules.get(name)) is not None:
                    linear = unwrap(part)
                    stack.enter_context(swapped_forward(linear, _only_at(place, linear.forward)))
        yield


def _only_at(place: Tensor, native: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        found = native(hidden.reshape(-1, hidden.shape[-1])[place])
        return (
            found.new_zeros(hidden.shape[:-1].numel(), found.shape[-1])
            .index_copy_(0, place, found)
            .view(*hidden.shape[:-1], found.shape[-1])
        )

    return forward


def _attentions(moe: MoEHooks) -> list[AttentionBridge]:
    return [m for block in moe.bridge.blocks for m in block.modules() if isinstance(m, AttentionBridge)]


def _config(attention: AttentionBridge) -> Any:
    return getattr(unwrap(attention), "config", None) or attention.config


def _with_parts(config: Any) -> Iterator[Any]:
    """A config, then the configs inside it (of the text, of an image encoder), each after the one that holds it."""
    yield config
    for name in getattr(config, "sub_configs", ()):
        if (part := getattr(config, name, None)) is not None:
            yield from _with_parts(part)
