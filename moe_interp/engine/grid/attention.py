"""Attention of a grid of branches: row r holds route r of every position of a sequence, in order.

The branch at position p reads the base pass's keys of earlier positions, and its own. So all rows of a sequence do
ordinary causal attention over the same keys, one position back: the queries 1..T-1 over the keys 0..T-2. With its
output o and the logarithm L of its sum of exponentials, and the own score s, own value v and score z of a sink, the
whole softmax gives (derived)

    w = sigmoid(s - L),  (o + w (v - o)) * sigmoid(logaddexp(L, s) - z),

without the last factor where there are no sinks. A branch that reads no earlier key gives its own value.

The kernels that compute o and L are in ``kernels.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_interp.engine.branch_attention import EarlierKeys
from moe_interp.engine.grid.kernels import Kernel, kernel_for, plain_kernel, score_format


@dataclass(frozen=True, eq=False)
class SequenceMask:
    """The causal mask of one sequence: each token reads all earlier ones, those of a window, or as a bias says.

    Attributes:
        start, stop: The real positions.
        window: A token reads so many positions, itself among them; 0 for all.
        bias: ``[stop - start, stop - start]``, added to scores, where that is not all; NEVER at all but earlier keys.
        reads: ``[stop - start]`` bool, beside a bias: whether it leaves the token any earlier key.
    """

    start: int
    stop: int
    window: int = 0
    bias: Tensor | None = None
    reads: Tensor | None = None

    @property
    def reads_earlier(self) -> bool:
        """Whether any token reads another one."""
        return self.stop - self.start > 1 and self.window != 1


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of one sequence.

    Attributes:
        start, stop: Which rows.
        mask: The sequence's.
        keys, values: Of its real positions but the last, ``[kv_head, n, d]``.
        kernel: What does their attention.
    """

    start: int
    stop: int
    mask: SequenceMask
    keys: Tensor
    values: Tensor
    kernel: Kernel

    @staticmethod
    def of(start: int, stop: int, mask: SequenceMask, keys: Tensor, values: Tensor) -> Piece:
        """Of a sequence's recorded keys and values ``[kv_head, pos, d]``."""
        read = slice(mask.start, max(mask.stop - 1, mask.start))
        kernel = plain_kernel
        if mask.reads_earlier:
            kind = "bias" if mask.bias is not None else "window" if mask.window else "causal"
            kernel = kernel_for(keys.device, keys.dtype, keys.shape[-1], values.shape[-1], kind)
        return Piece(start, stop, mask, keys[:, read], values[:, read], kernel)


class GridKeys(EarlierKeys):
    """What a grid's rows read in a layer.

    Args:
        keys, values: The layer's recorded ones.
        parts: Rows by sequence: its number, where they start and stop, and what the sequence's tokens read.
        scores_at_once: How many attention scores to hold together where no kernel serves; one row's at least.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, parts: list[tuple[int, int, int, SequenceMask]], scores_at_once: int
    ) -> None:
        super().__init__(keys, values)
        self.pieces = [Piece.of(start, stop, mask, keys[s], values[s]) for s, start, stop, mask in parts]
        self.scores_at_once = scores_at_once

    @property
    def holds_scores(self) -> bool:
        """Whether some rows have no kernel that serves them."""
        return any(piece.kernel is plain_kernel and piece.mask.reads_earlier for piece in self.pieces)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, sinks: Tensor | None, softcap: float | None
    ) -> Tensor:
        n_rows, n_heads, n, _ = query.shape
        out = query.new_empty(n_rows, n, n_heads, value.shape[-1], dtype=value.dtype)
        group = n_heads // key.shape[1]
        for piece in self.pieces:
            rows = slice(piece.start, piece.stop)
            own_score = _own_scores(query[rows], key[rows], scale, softcap)
            own_value = value[rows].repeat_interleave(group, dim=1) if group > 1 else value[rows]
            here = out[rows].transpose(1, 2)
            total = own_score
            if not piece.mask.reads_earlier:
                here.copy_(own_value)
            else:
                lse = self._merge(here, piece, query[rows], own_score, own_value, scale, softcap)
                if sinks is not None:
                    later = slice(piece.mask.start + 1, piece.mask.stop)
                    total = own_score.clone()
                    total[:, :, later] = torch.logaddexp(own_score[:, :, later], lse)
            if sinks is not None:
                here.mul_(torch.sigmoid(total - sinks.view(1, -1, 1)).unsqueeze(-1).to(out.dtype))
        return out

    def _merge(
        self,
        out: Tensor,
        piece: Piece,
        query: Tensor,
        own_score: Tensor,
        own_value: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Fills ``out`` ``[row, head, n, d_value]``; gives the log-sum-exp over earlier keys of all real positions but
        the first."""
        mask = piece.mask
        first, later = mask.start + 1, slice(mask.start + 1, mask.stop)
        # a branch without earlier keys; at padding, any finite number
        out[:, :, :first] = own_value[:, :, :first]
        out[:, :, mask.stop :] = own_value[:, :, mask.stop :]
        window = mask.window - 1 if mask.window else 0
        bias = None if mask.bias is None else mask.bias[1:, :-1]
        if softcap is not None or piece.kernel is plain_kernel:
            read, lse = plain_kernel(
                query[:, :, later], piece.keys, piece.values, scale=scale, window=window, bias=bias, softcap=softcap,
                scores_at_once=self.scores_at_once,
            )  # fmt: skip
        else:
            read, lse = piece.kernel(
                query[:, :, later], piece.keys, piece.values, scale=scale, window=window, bias=bias
            )
        if mask.reads is not None:
            lse = lse.masked_fill(~mask.reads[1:], float("-inf"))
        share = torch.sigmoid(own_score[:, :, later] - lse).unsqueeze(-1).to(read.dtype)
        out[:, :, later] = torch.lerp(read, own_value[:, :, later].to(read.dtype), share)
        return lse


def _own_scores(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
    """``[row, head, n]``, in float32 at least."""
    n_rows, n_heads, n, width = query.shape
    # shape: (row, kv_head, group, n, d) with (row, kv_head, 1, n, d)
    grouped = query.view(n_rows, key.shape[1], -1, n, width) * key.unsqueeze(2)
    scores = grouped.sum(-1, dtype=score_format(query.dtype)).view(n_rows, n_heads, n) * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
