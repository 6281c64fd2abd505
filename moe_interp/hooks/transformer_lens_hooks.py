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
class TheirHook:
    """One of TransformerLens' hooks.

    Attributes:
        path: Its name below the block.
        shows: What it shows, in our words; see :func:`as_theirs`.
        axes: Its axes.
    """

    path: str
    shows: str
    axes: str = "token expert"


def _of_router(router: str, *, opened: bool) -> tuple[TheirHook, ...]:
    """The hooks of a router that TransformerLens wraps: logits, and where it opens the triple, the route."""
    logits = TheirHook(f"{router}.hook_out", "router_logits")
    if not opened:
        return (logits,)
    weights = TheirHook(f"{router}.hook_expert_weights", "expert_weights at full width")
    indices = TheirHook(f"{router}.hook_expert_indices", "expert_indices", "token slot")
    return logits, weights, indices


def _swapped(container: str) -> tuple[TheirHook, ...]:
    """Granite: mis-wired, each hook shows another thing than its name says."""
    return (
        TheirHook(f"{container}.gate.hook_out", "expert_indices", "token slot"),
        TheirHook(f"{container}.gate.hook_expert_weights", "expert_weights", "token slot"),
        TheirHook(f"{container}.gate.hook_expert_indices", "router_logits"),
    )


_OPENED = (
    *("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen3_vl_moe"),
    *("glm4_moe", "glm4_moe_lite", "phimoe", "lfm2_moe", "minimax_m2"),
)
_CLOSED = ("flex_olmo", "deepseek_v2", "deepseek_v3", "deepseek_v4", "glm_moe_dsa", "jetmoe", "ernie4_5_moe")

THEIR_HOOKS: dict[str, tuple[TheirHook, ...]] = {
    **{name: _of_router("mlp.gate", opened=True) for name in _OPENED},
    **{name: _of_router("mlp.gate", opened=False) for name in _CLOSED},
    "gpt_oss": (
        *_of_router("mlp.router", opened=True),
        TheirHook("mlp.hook_router_scores", "expert_weights", "token slot"),
    ),
    "granite_moe": _swapped("mlp"),
    "granite_moe_hybrid": _swapped("moe"),
    "afmoe": _of_router("mlp.router_gate", opened=False),
    "laguna": (TheirHook("mlp.gate.hook_out", "router_logits after the soft-cap"),),
    "llama4": (
        TheirHook("mlp.router.hook_out", "expert_weights at full width"),
        TheirHook("mlp.hook_router_scores", "router_logits"),
    ),
    "switch_transformers": (TheirHook("mlp.gate.hook_out", "expert_indices as one-hot", "batch pos expert"),),
    "gemma4": (TheirHook("router.hook_out", "router_probs"),),
    "jamba": (TheirHook("mlp.router.hook_out", "a tuple", "none"),),
    "nemotron_h": (),
}
"""Family -> its hooks. Nothing in them can be compared for jamba, whose hook is handed a tuple."""


def as_theirs(shows: str, ours: Mapping[str, Tensor], rule: RoutingRule) -> Tensor:
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
