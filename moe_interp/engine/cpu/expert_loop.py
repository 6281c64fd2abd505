"""A layer's experts one after the other, as an implementation that transformers can call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_interp.arch.expert_functions import StackedExperts
from moe_interp.engine.cpu.matmul import is_faster, linear, padded

LOOP = "moe_interp_loop"


def looped_experts(module: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of a module's experts, one expert after the other.

    Args:
        module: Of transformers' stacked experts.
        hidden: ``[token, d_in]``, at least one token.
        indices, weights: ``[token, slot]``, without empty slots.

    Returns:
        ``[token, d_out]``.
    """
    experts = StackedExperts(module, linear)
    order = indices.flatten().argsort(stable=True)
    tokens = order.div(indices.shape[1], rounding_mode="floor")
    sizes = torch.bincount(indices.flatten(), minlength=experts.n_experts).tolist()
    outputs, start = hidden.new_empty(len(order), experts.d_out), 0
    for expert, size in enumerate(sizes):
        if size:
            # a product pads its rows: here it costs no copy
            rows = torch.nn.functional.pad(tokens[start : start + size], (0, padded(size) - size))
            neurons = experts.hidden(hidden.index_select(0, rows), expert)
            _write(experts, neurons, expert, outputs[start : start + size])
            start += size
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    # shape: (token * slot, d_out), sorted by expert -> (token, d_out)
    return torch.nn.functional.embedding_bag(
        place.view(indices.shape), outputs, per_sample_weights=weights.to(hidden.dtype), mode="sum"
    )


def _write(experts: StackedExperts, hidden: Tensor, expert: int, out: Tensor) -> None:
    """The first rows of an expert's output into ``out`` ``[row, d_out]``."""
    module, weight = experts.module, experts.down[expert]
    is_bare = experts.down_bias is None and not getattr(module, "has_post_expert_norm", False)
    if is_bare and len(hidden) == len(out) and not is_faster(hidden, weight):
        torch.mm(hidden, weight if module.is_transposed else weight.t(), out=out)
    else:
        out.copy_(experts.output(hidden, expert)[: len(out)])


ALL_EXPERTS_FUNCTIONS.register(LOOP, looped_experts)
