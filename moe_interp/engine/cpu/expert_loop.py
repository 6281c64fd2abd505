"""A layer's experts one after the other, as an implementation that transformers can call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_interp.arch.expert_functions import StackedExperts
from moe_interp.arch.products import padded

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
    experts = StackedExperts(module)
    order = indices.flatten().argsort(stable=True)
    tokens = order.div(indices.shape[1], rounding_mode="floor")
    sizes = torch.bincount(indices.flatten(), minlength=experts.n_experts).tolist()
    outputs, start = hidden.new_empty(len(order), experts.d_out), 0
    for expert, size in enumerate(sizes):
        if size:
            # a product pads its rows: here it costs no copy
            rows = torch.nn.functional.pad(tokens[start : start + size], (0, padded(size) - size))
            neurons = experts.hidden(hidden.index_select(0, rows), expert)
            experts.write(neurons, expert, outputs[start : start + size])
            start += size
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    # shape: (token * slot, d_out), sorted by expert -> (token, d_out)
    return torch.nn.functional.embedding_bag(
        place.view(indices.shape), outputs, per_sample_weights=weights.to(hidden.dtype), mode="sum"
    )


ALL_EXPERTS_FUNCTIONS.register(LOOP, looped_experts)
