"""Ends of sequences that run together, as the rows of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_interp.engine.branch_rows import CompactRows
from moe_interp.engine.recorded_pass import RecordedPass


class EndRows(CompactRows):
    """Ends of sequences, from one position on: each token reads what it reads in the recorded pass.

    Args:
        base: The recorded pass.
        sequence: ``[row]``, which sequence of the batch each row is.
        start: The first position.
        block_out: ``[row, pos - start, d_model]``, the output of the first layer's experts' block.
    """

    def __init__(self, base: RecordedPass, sequence: Tensor, start: int, block_out: Tensor) -> None:
        position = torch.arange(start, base.tokens.shape[1], device=sequence.device).expand(len(sequence), -1)
        super().__init__(base, sequence, position, block_out)
        self.crop = start
        self._attended: dict[int | None, Tensor] = {}

    def attention_mask(self, layer: int) -> Tensor:
        """``[row or 1, 1, pos - start, pos]``."""
        number = self.base.arguments.number(layer, "attention_mask")
        if number not in self._attended:
            self._attended[number] = self._of(self.base.arguments.value(number))
        return self._attended[number]

    def _of(self, mask: Tensor | None) -> Tensor:
        if mask is not None:
            rows = mask[:, :, self.crop :]
            return rows if len(rows) == 1 else rows[self.sequence]
        n, n_pos = self.position.shape[1], self.base.tokens.shape[1]
        later = torch.ones(n, n_pos, dtype=torch.bool, device=self.block_out.device).triu(self.crop + 1)
        never = torch.finfo(self.block_out.dtype).min
        return self.block_out.new_zeros(1, 1, n, n_pos).masked_fill(later, never)
