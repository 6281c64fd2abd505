"""TransformerLens' own router hooks, and which of our activations each of them shows.

They are flat, ``[token, ...]`` with the batch folded into the tokens. Attaching changes neither them nor what editing
them does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_interp.arch.rules import RoutingRule, SigmoidTopK, TopKSigmoid


@dataclass(frozen=True)
class TransformerLensHook:
    """One of TransformerLens' hooks.

    Attributes:
        path: Its name below the block.
        shows: What it shows, in our words; see :func:`shown_by_transformer_lens`.
        axes: Its axes.
    """

    path: str
    shows: str
    axes: str = "token expert"


def _of_router(router: str, *, opened: bool) -> tuple[TransformerLensHook, ...]:
    """The hooks of a router that TransformerLens wraps: logits, and where it opens the triple, the route."""
    logits = TransformerLensHook(f"{router}.hook_out", "router_logits")
    if not opened:
        return (logits,)
    weights = TransformerLensHook(f"{router}.hook_expert_weights", "expert_weights at full width")
    indices = TransformerLensHook(f"{router}.hook_expert_indices", "expert_indices", "token slot")
    return logits, weights, indices


def _miswired(container: str) -> tuple[TransformerLensHook, ...]:
    """Granite: mis-wired, each hook shows another thing than its name says."""
    return (
        TransformerLensHook(f"{container}.gate.hook_out", "expert_indices", "token slot"),
        TransformerLensHook(f"{container}.gate.hook_expert_weights", "expert_weights", "token slot"),
        TransformerLensHook(f"{container}.gate.hook_expert_indices", "router_logits"),
    )


_OPENED = (
    *("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen3_vl_moe"),
    *("glm4_moe", "glm4_moe_lite", "phimoe", "lfm2_moe", "minimax_m2"),
)
_CLOSED = ("flex_olmo", "deepseek_v2", "deepseek_v3", "deepseek_v4", "glm_moe_dsa", "jetmoe", "ernie4_5_moe")

TRANSFORMER_LENS_HOOKS: dict[str, tuple[TransformerLensHook, ...]] = {
    **{name: _of_router("mlp.gate", opened=True) for name in _OPENED},
    **{name: _of_router("mlp.gate", opened=False) for name in _CLOSED},
    "gpt_oss": (
        *_of_router("mlp.router", opened=True),
        TransformerLensHook("mlp.hook_router_scores", "expert_weights", "token slot"),
    ),
    "granite_moe": _miswired("mlp"),
    "granite_moe_hybrid": _miswired("moe"),
    "afmoe": _of_router("mlp.router_gate", opened=False),
    "laguna": (TransformerLensHook("mlp.gate.hook_out", "router_logits after the soft-cap"),),
    "llama4": (
        TransformerLensHook("mlp.router.hook_out", "expert_weights at full width"),
        TransformerLensHook("mlp.hook_router_scores", "router_logits"),
    ),
    "switch_transformers": (TransformerLensHook("mlp.gate.hook_out", "expert_indices as one-hot", "batch pos expert"),),
    "gemma4": (TransformerLensHook("router.hook_out", "router_probs"),),
    "jamba": (TransformerLensHook("mlp.router.hook_out", "a tuple", "none"),),
    "nemotron_h": (),
}
"""Family -> its hooks. Nothing in them can be compared for jamba, whose hook is handed a tuple."""


def shown_by_transformer_lens(shows: str, ours: Mapping[str, Tensor], rule: RoutingRule) -> Tensor:
    """What one of their hooks must show, computed from ours; still ``[batch, pos, ...]``.

    Raises:
        KeyError: our activation was not recorded.
    """
    if shows == "expert_weights at full width":
        indices, weights = ours["expert_indices"], ours["expert_weights"]
        if weights.shape[-1] == rule.n_experts and not isinstance(rule, TopKSigmoid):
            return weights  # which they take for the full width already; Llama 4's own router returns that
        full = weights.new_zeros(*weights.shape[:-1], rule.n_experts)
        return full.scatter_add(-1, indices.clamp(min=0), weights)
    if shows == "expert_indices as one-hot":
        indices = ours["expert_indices"]
        one_hot = torch.zeros(*indices.shape[:-1], rule.n_experts, dtype=torch.int64, device=indices.device)
        return one_hot.scatter(-1, indices.clamp(min=0), (indices >= 0).long())
    if shows == "router_logits after the soft-cap":
        assert isinstance(rule, SigmoidTopK)
        return rule.capped(ours["router_logits"])
    return ours[shows]
