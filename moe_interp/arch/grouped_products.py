"""Products of many rows with a stack of matrices, each row with its own expert's: one call for all experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_ALIGNMENT = 16  # bytes: strides and addresses that the kernels read
_MOST_GROUPS = 1023
_PLAIN = (Tensor, nn.Parameter)
# torch gave it a public name in 2.10
_PRODUCT: Callable[..., Tensor] | None = getattr(nn.functional, "grouped_mm", getattr(torch, "_grouped_mm", None))


@dataclass(frozen=True, eq=False)
class RowGroups:
    """Which expert each row belongs to. Rows are sorted by expert; those of no expert come last.

    Attributes:
        experts: ``[row]``, each row's expert; ``n_experts`` for rows of no expert.
        ends: ``[expert]`` int32, where each expert's rows end: the cumulative sum of their numbers.
    """

    experts: Tensor
    ends: Tensor

    @staticmethod
    def of_sorted(experts: Tensor, n_experts: int) -> RowGroups:
        """The groups of rows that are sorted by expert already, without waiting for the device."""
        every = torch.arange(n_experts, device=experts.device, dtype=experts.dtype)
        return RowGroups(experts, torch.searchsorted(experts, every, right=True, out_int32=True))

    @property
    def n_experts(self) -> int:
        return len(self.ends)

    @cached_property
    def without_expert(self) -> Tensor:
        """``[row, 1]`` bool: the rows of no expert, for which a grouped product leaves memory as it was."""
        return (self.experts == self.n_experts).unsqueeze(-1)

    def each(self) -> Iterator[tuple[slice, int]]:
        """The rows of every expert that has some. The host waits for the device here."""
        start = 0
        for expert, end in enumerate(self._ends_on_host):
            if end > start:
                yield slice(start, end), expert
            start = end

    @cached_property
    def _ends_on_host(self) -> list[int]:
        return self.ends.tolist()

    def parts(self, n_rows: int) -> Iterator[tuple[slice, RowGroups]]:
        """Consecutive rows, so many at a time, with their groups."""
        for start in range(0, len(self.experts), n_rows):
            some = slice(start, min(start + n_rows, len(self.experts)))
            yield some, RowGroups(self.experts[some], self.ends.clamp(start, some.stop) - start)


def sort_by_expert(ids: Tensor, n_experts: int) -> tuple[Tensor, RowGroups]:
    """The order ``[row]`` in which rows are sorted by expert, and their groups. The host does not wait for the device.

    Args:
        ids: ``[row]`` expert ids; negative ones mark rows of no expert.
        n_experts: How many there are.
    """
    experts, order = ids.masked_fill(ids < 0, n_experts).sort(stable=True)
    return order, RowGroups.of_sorted(experts, n_experts)


def grouped_linear(rows: Tensor, groups: RowGroups, weights: Tensor, biases: Tensor | None, transposed: bool) -> Tensor:
    """``linear(row, weights[expert], biases[expert])`` of every row.

    Rows of no expert give zeros where gradients are recorded, and whatever was in memory elsewhere; they receive no
    gradient and give none.

    Args:
        rows: ``[row, d_in]``.
        groups: Their experts.
        weights: ``[expert, d_out, d_in]``; ``transposed`` ``[expert, d_in, d_out]``.
        biases: ``[expert, d_out]``.
        transposed: Which of the two ``weights`` are.

    Returns:
        ``[row, d_out]``.
    """
    assert _PRODUCT is not None
    with_gradient = torch.is_grad_enabled()
    # the products of the backward pass leave memory as it was there, too
    rows = rows.masked_fill(groups.without_expert, 0.0) if with_gradient else rows
    out = _PRODUCT(rows, weights if transposed else weights.transpose(-2, -1), offs=groups.ends)
    if biases is not None:
        out = out + biases.index_select(0, groups.experts.clamp(max=groups.n_experts - 1))
    return out.masked_fill(groups.without_expert, 0.0) if with_gradient else out


def has_grouped_product(like: Tensor) -> bool:
    """Whether torch has a grouped product for tensors of this number format on this device: tried once for each."""
    key = (like.dtype, like.device)
    if key not in _TRIED:
        _TRIED[key] = _try(like)
    return _TRIED[key]


_TRIED: dict[tuple[torch.dtype, torch.device], bool] = {}
# no memory, or an earlier fault of the device: the product may exist all the same (torch 2.8 names the second)
_NOT_OF_THE_PRODUCT = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


@torch.no_grad()
def _try(like: Tensor) -> bool:
    if _PRODUCT is None:
        return False
    # no dtype by name: a mode may lift those
    rows, weights = like.new_zeros(4, 16), like.new_zeros(2, 16, 16)
    groups = RowGroups.of_sorted(torch.arange(4, device=like.device) // 2, 2)
    try:
        grouped_linear(rows, groups, weights, None, transposed=False)
    except _NOT_OF_THE_PRODUCT:
        raise
    except RuntimeError:  # torch has none for this dtype or device (NotImplementedError is one of them)
        return False
    return True


def can_be_grouped(rows: Tensor, *stacks: Tensor) -> bool:
    """Whether a grouped product takes these rows and stacks of matrices, with the result and the gradients of a loop.

    Args:
        rows: ``[row, d]``.
        stacks: ``[expert, d_1, d_2]`` each.
    """
    return (
        len(rows) > 0
        and bool(stacks)
        and _is_taken_as_it_is(rows)
        and all(_is_taken_as_it_is(s) and s.dtype == rows.dtype and s.device == rows.device for s in stacks)
        and all(len(stack) <= _MOST_GROUPS and _is_aligned(stack) for stack in stacks)
        and not _is_cast(rows.device.type)
        and has_grouped_product(rows)
    )


def _is_cast(device: str) -> bool:
    """Whether autocast, which not every kind of device has, casts what a linear map reads."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _is_taken_as_it_is(tensor: Tensor) -> bool:
    # subclasses have products of their own; forward-mode derivatives are not there for the grouped one
    return type(tensor) in _PLAIN and forward_ad.unpack_dual(tensor).tangent is None


def _is_aligned(stack: Tensor) -> bool:
    size = stack.element_size()
    strides: Any = [width * size for width in stack.shape[1:]]
    return stack.is_contiguous() and not any(n % _ALIGNMENT for n in (*strides, stack.data_ptr()))
