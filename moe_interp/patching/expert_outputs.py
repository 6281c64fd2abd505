"""What experts would give on other inputs than their own, from the layer's spec."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_interp.arch.grouped_experts import hidden_of_rows, output_of_rows
from moe_interp.arch.grouped_products import RowGroups, sort_by_expert
from moe_interp.arch.spec import MoESpec


@torch.no_grad()
def every_expert(spec: MoESpec, read: Tensor) -> Tensor:
    """The output of every expert on every row, before a weight: ``[row, d_in] -> [row, expert, d_model]``."""
    n_experts, n_rows = spec.n_experts, len(read)
    groups = RowGroups.of_sorted(torch.arange(n_experts, device=read.device).repeat_interleave(n_rows), n_experts)
    # shape: (expert * row, d_model) -> (row, expert, d_model)
    return _outputs(spec, read.repeat(n_experts, 1), groups).view(n_experts, n_rows, -1).transpose(0, 1)


@torch.no_grad()
def slot_outputs(spec: MoESpec, read: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """What ``expert_out`` would hold if the experts of a route read something else; zero at empty slots.

    Args:
        spec: The layer.
        read: ``[batch, pos, d_in]``, what the experts read.
        indices, weights: ``[batch, pos, slot]``; the weights enter where the family scales its experts' input.

    Returns:
        ``[batch, pos, slot, d_model]``.
    """
    slots = indices.shape[-1]
    # pairs of a token and one of its slots, sorted by expert; empty slots come last and give zero
    order, groups = sort_by_expert(indices.reshape(-1), spec.n_experts)
    rows = read.reshape(-1, read.shape[-1])[order // slots]
    if spec.weight_on_input:
        rows = rows * weights.reshape(-1)[order].unsqueeze(-1).to(rows.dtype)
    pairs = _outputs(spec, rows, groups)
    return torch.empty_like(pairs).index_copy_(0, order, pairs).view(*indices.shape, -1)


def _outputs(spec: MoESpec, rows: Tensor, groups: RowGroups) -> Tensor:
    """``[row, d_in]``, sorted by expert, to ``[row, d_model]``."""
    with spec.reading_experts():
        experts, project = spec.expert_functions, spec.project
        outputs = output_of_rows(experts, hidden_of_rows(experts, rows, groups), groups, rows.shape[-1])
        return outputs if project is None else project(outputs)
