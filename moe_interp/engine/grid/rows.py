"""Branches as a grid: an ordinary batch, of which row r holds route r of every position of a sequence, in order.

Positions are those of any forward pass, so masks, rotary tables, norms, routers and experts run as they do in one, and
nothing is gathered. Only attention differs: see ``attention.py``. Where most positions are scored, this is the way
of a GPU; where few are, compact rows have less to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_interp.engine.branch_rows import Rows, RowsCache
from moe_interp.engine.grid.attention import GridKeys, SequenceMask
from moe_interp.engine.grid.kernels import NEVER
from moe_interp.engine.recorded_pass import RecordedPass


class RowsOfSequence(NamedTuple):
    """How many rows of a grid one sequence has."""

    sequence: int
    n_rows: int


class GridRows(Rows):
    """A few routes of every position of some sequences.

    Attributes:
        parts: How many rows each of the sequences has, one sequence after the other.
        scores_at_once: How many attention scores to hold together where no kernel serves; one row's at least.

    Args:
        base: The base pass.
        parts: See above.
        block_out: ``[row, pos, d_model]``, the output of the experts' block: a route's, or any where none is scored.
        scores_at_once: See above.
    """

    def __init__(
        self, base: RecordedPass, parts: Sequence[RowsOfSequence], block_out: Tensor, scores_at_once: int = 2**26
    ) -> None:
        super().__init__(base, block_out)
        self.parts, self.scores_at_once = list(parts), scores_at_once
        self._index: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        return self._of_rows(self.base.tokens)

    @property
    def positions(self) -> Tensor:
        pos = self.base.tokens.shape[1]
        return torch.arange(pos, device=self.block_out.device).expand(len(self.block_out), pos)

    def cache(self) -> RowsCache:
        return RowsCache(self)

    def at(self, value: Tensor) -> Tensor | None:
        batch, pos = self.base.tokens.shape
        if value.shape[:2] == (batch, pos):
            return self._of_rows(value)
        if value.shape[:1] == (batch * pos,):
            return self._of_rows(value.view(batch, pos, *value.shape[1:])).reshape(-1, *value.shape[1:])
        return self._repeated(value) if value.shape[:2] == (1, pos) else None

    def attention_mask(self, layer: int) -> Any:
        recorded = self.base.cache.recorded.get(layer)
        if recorded is None:
            return None
        masks, parts, start = masks_of(self.base, layer), [], 0
        for sequence, n_rows in self.parts:
            parts.append((sequence, start, start + n_rows, masks[sequence]))
            start += n_rows
        return GridKeys(*recorded, parts, self.scores_at_once)

    def _of_rows(self, value: Tensor) -> Tensor:
        """``[batch, ...]`` at the rows' sequences; without a copy where there is one sequence."""
        if len(self.parts) == 1:
            return self._repeated(value[self.parts[0].sequence].unsqueeze(0))
        if self._index is None:
            index = [sequence for sequence, n_rows in self.parts for _ in range(n_rows)]
            self._index = torch.tensor(index, device=value.device)
        return value.index_select(0, self._index)

    def _repeated(self, value: Tensor) -> Tensor:
        return value.expand(len(self.block_out), *value.shape[1:])


# -- what the tokens of a base pass read ---------------------------------------------------------------------------
def masks_of(base: RecordedPass, layer: int) -> list[SequenceMask]:
    """By sequence, what its tokens read in a layer: from the mask that the layer was called with."""
    number = base.arguments.number(layer, "attention_mask")
    if number not in base.sequence_masks:
        mask = base.arguments.value(number)
        base.sequence_masks[number] = _causal(base) if mask is None else _from_mask(base, mask)
    return base.sequence_masks[number]


def _causal(base: RecordedPass) -> list[SequenceMask]:
    batch, pos = base.tokens.shape
    return [SequenceMask(0, pos)] * batch


def _from_mask(base: RecordedPass, mask: Tensor) -> list[SequenceMask]:
    """Of a mask ``[batch or 1, 1, pos, pos]``: a triangle, a window, or else the mask itself."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)
    if len(mask) == 1 and bool(base.is_real.all()):
        return [_sequence_mask(mask[0, 0], base.is_real[0])] * len(base.tokens)
    return [_sequence_mask(mask[s if len(mask) > 1 else 0, 0], real) for s, real in enumerate(base.is_real)]


def _sequence_mask(added: Tensor, real: Tensor) -> SequenceMask:
    """Of one sequence, from ``[pos, pos]`` and ``[pos]``."""
    is_hidden = added <= torch.finfo(added.dtype).min / 2
    places = real.nonzero().flatten()
    if not len(places):
        return SequenceMask(0, 0)
    start, stop = int(places[0]), int(places[-1]) + 1
    if not bool(is_hidden[start:stop, :start].all()):
        start = 0
    added, is_hidden, n = added[start:stop, start:stop], is_hidden[start:stop, start:stop], stop - start
    place = torch.arange(n, device=added.device)
    back = place.unsqueeze(1) - place
    is_later = back <= 0
    window = n - int(is_hidden[-1].sum())
    is_window = (is_hidden == (back >= window)) | is_later
    if n < 2 or (bool(is_window.all()) and not bool(added.masked_fill(is_hidden | is_later, 0.0).any())):
        return SequenceMask(start, stop, 0 if window == n else window)
    is_hidden |= is_later
    reads = ~is_hidden.all(dim=-1)
    bias = added.to(torch.promote_types(added.dtype, torch.float32)).masked_fill(is_hidden, NEVER)
    bias = bias.masked_fill(~reads.unsqueeze(-1), 0.0)  # a softmax over nothing would be NaN
    return SequenceMask(start, stop, 0, bias, reads)


def holds_scores(base: RecordedPass, layer: int) -> bool:
    """Whether attention of branches from a layer holds scores: some layer above has no kernel that serves."""
    for above in range(layer + 1, len(base.blocks)):
        recorded = base.cache.recorded.get(above)
        if recorded is not None:
            parts = [(s, 0, 1, mask) for s, mask in enumerate(masks_of(base, above))]
            if GridKeys(*recorded, parts, 1).holds_scores:
                return True
    return False
