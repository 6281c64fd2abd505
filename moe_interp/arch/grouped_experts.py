"""What experts compute for rows sorted by expert: by grouped products where these pay, else in a loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_interp.arch.expert_functions import ExpertFunctions, StackedFunctions
from moe_interp.arch.grouped_products import RowGroups, can_be_grouped

# rows an expert: with fewer, grouped products are up to 1.6 times as fast; with many the loop up to 1.25 times, as it
# keeps an expert's rows in the processor's cache (measured at widths from 64 to 2048)
LOOP_FROM_ROWS = 16


def hidden_of_rows(experts: ExpertFunctions, rows: Tensor, groups: RowGroups, grouped: bool | None = None) -> Tensor:
    """Each row's neurons after the activation ``[row, d_expert]``; zeros for rows of no expert.

    Args:
        experts: A layer's.
        rows: ``[row, d_in]``, sorted by expert.
        groups: Their experts.
        grouped: Whether to take grouped products; by default where :func:`takes_grouped_products`.
    """
    grouped = takes_grouped_products(experts, rows, len(rows)) if grouped is None else grouped
    if grouped and isinstance(experts, StackedFunctions):
        return _zeroed(experts.hidden_of_groups(rows, groups), groups)
    return _loop(experts.hidden, rows, groups, experts.d_expert)


def output_of_rows(
    experts: ExpertFunctions, hidden: Tensor, groups: RowGroups, d_out: int, grouped: bool | None = None
) -> Tensor:
    """Each row's output ``[row, d_out]`` from its neurons ``[row, d_expert]``, before a weight; as above."""
    grouped = takes_grouped_products(experts, hidden, len(hidden)) if grouped is None else grouped
    if grouped and isinstance(experts, StackedFunctions):
        return _zeroed(experts.output_of_groups(hidden, groups), groups)
    return _loop(experts.output, hidden, groups, d_out)


def takes_grouped_products(experts: ExpertFunctions, like: Tensor, n_rows: int) -> bool:
    """Whether these experts run by grouped products: where these give what the loop gives, and are faster.

    A loop asks the host for the number of rows of each expert; on a device other than the processor, that waits. On a
    processor it keeps an expert's rows in the cache, and wins where they are many.

    Args:
        experts: A layer's.
        like: ``[..., d]``, rows as they will be.
        n_rows: How many these will be.
    """
    return (
        isinstance(experts, StackedFunctions)
        and not experts.is_watched
        and can_be_grouped(like, *experts.stacks)
        and (like.device.type != "cpu" or is_faster_on_cpu(n_rows, experts))
    )


def is_faster_on_cpu(n_rows: int, experts: StackedFunctions) -> bool:
    """Whether grouped products are faster than the loop on a processor, of so many rows in all.

    In the backward pass a loop makes a whole stack of zeros for each expert.
    """
    return torch.is_grad_enabled() or n_rows < LOOP_FROM_ROWS * experts.n_experts


def _loop(function: Callable[[Tensor, int], Tensor], rows: Tensor, groups: RowGroups, width: int) -> Tensor:
    """Apply one expert's function to each expert's consecutive rows."""
    parts = [function(rows[some], expert) for some, expert in groups.each()]
    if (missing := len(rows) - sum(map(len, parts))) or not parts:
        parts.append((parts[0] if parts else rows).new_zeros(missing, width))
    return torch.cat(parts)


def _zeroed(values: Tensor, groups: RowGroups) -> Tensor:
    """Rows of no expert hold what was in memory, or an activation or a norm of zero."""
    if torch.is_grad_enabled():
        return values.masked_fill(groups.without_expert, 0.0)
    return values.masked_fill_(groups.without_expert, 0.0)
