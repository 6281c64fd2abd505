"""Counts of many possible outcomes of which few occur: token ids by expert, paths over layers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

COMPACT_AT = 2_000_000


class SparseCounts:
    """How often each code occurred: codes in ascending order, and their counts.

    Chunks are added as they come and joined when they have grown, so that a stream costs little more than one sort.
    """

    def __init__(self, codes: NDArray[np.int64] | None = None, counts: NDArray[np.int64] | None = None) -> None:
        self._codes = np.zeros(0, np.int64) if codes is None else codes
        self._counts = np.zeros(0, np.int64) if counts is None else counts
        self._pending: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self._waiting = 0

    @classmethod
    def of(cls, codes: NDArray[np.int64]) -> SparseCounts:
        """The counts of a list of codes."""
        return cls(*np.unique(codes, return_counts=True))

    def add(self, other: SparseCounts) -> None:
        """Add the counts of another table."""
        codes, counts = other.table()
        self._pending.append((codes, counts))
        self._waiting += len(codes)
        if self._waiting > max(COMPACT_AT, len(self._codes) // 2):
            self.table()

    def table(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Codes in ascending order, and their counts."""
        if self._pending:
            codes = np.concatenate([self._codes, *[c for c, _ in self._pending]])
            counts = np.concatenate([self._counts, *[n for _, n in self._pending]])
            order = np.argsort(codes, kind="stable")
            codes, counts = codes[order], counts[order]
            starts = np.flatnonzero(np.diff(codes, prepend=codes[:1] - 1))
            self._codes, self._counts = codes[starts], np.add.reduceat(counts, starts) if len(starts) else counts
            self._pending, self._waiting = [], 0
        return self._codes, self._counts
