"""What of some sequences of tokens runs together: those of like length, within a number of tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from moe_interp.results.cells import CellStore


def batches_of_like_length(
    rows: Sequence[Any], tokens_per_batch: int, names: Sequence[Any] | None = None
) -> list[list[int]]:
    """Indices of rows, longest first, cut so that rows x width stays within the budget (at least one each).

    Args:
        rows: Whose ``len`` is a number of tokens.
        tokens_per_batch: Padding included.
        names: The order of rows of one length; their own order by default.
    """
    ties = range(len(rows)) if names is None else names
    batches: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: (-len(rows[i]), ties[i])):
        if batches and len(rows[batches[-1][0]]) * (len(batches[-1]) + 1) <= tokens_per_batch:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def batches_of_run(
    rows: Sequence[Any],
    tokens_per_batch: Callable[[], int],
    memory_budget: int | None,
    store: str | os.PathLike[str] | None,
    names: Sequence[Any] | None = None,
) -> list[list[int]]:
    """:func:`batches_of_like_length`; without a budget those that the store was begun with, where there is one.

    Other batches round otherwise, and their cells are other ones.
    """
    stored = CellStore.batches_of(store, len(rows)) if store is not None and memory_budget is None else None
    return batches_of_like_length(rows, tokens_per_batch(), names) if stored is None else stored
