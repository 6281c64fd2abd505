"""Attention of a grid of branches: row r holds route r of every position of a sequence, in order.

The branch at position p reads the base pass's keys of earlier positions, and its own. So all rows of a sequence do
ordinary causal attention over the same keys, one position back: the queries 1..T-1 over the keys 0..T-2. With its
output o and the logarithm L of its sum of exponentials, and the own score s, own value v and score z of a sink, the
whole softmax gives (derived)

    w = sigmoid(s - L),  (o + w (v - o)) * sigmoid(logaddexp(L, s) - z),

without the last factor where there are no sinks. A branch that reads no earlier key gives its own value.

What gives o and L stands in ``kernels.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_interp.engine.branch_attention import EarlierKeys
from moe_interp.engine.grid.kernels import Kernel, kernel_for, plain_kernel, wide


@dataclass(frozen=True, eq=False)
class Reach:
    """What the tokens of one sequence read: of each other all earlier ones, those of a window, or as a bias says.

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


class GridKeys(EarlierKeys):
    """What a grid's rows read in a layer.

    Args:
        keys, values: The layer's recorded ones.
        pieces: Rows by sequence: its number, where they start and stop, and what the sequence's tokens read.
        scores_at_once: How many attention scores to hold together where no kernel serves; one row's at least.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, pieces: list[tuple[int, int, int, Reach]], scores_at_once: int
    ) -> None:
        super().__init__(keys, values)
        self.pieces, self.scores_at_once = pieces, scores_at_once
        self.kernels = [self._kernel(reach) for *_, reach in pieces]

    def _kernel(self, reach: Reach) -> Kernel:
        if reach.window == 1 or reach.stop - reach.start < 2:
            return plain_kernel
        kind = "bias" if reach.bias is not None else "window" if reach.window else "causal"
        return kernel_for(self.keys.device, self.keys.dtype, self.keys.shape[-1], self.values.shape[-1], kind)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, sinks: Tensor | None, softcap: float | None
    ) -> Tensor:
        n_rows, n_heads, n, _ = query.shape
        out = query.new_empty(n_rows, n, n_heads, value.shape[-1], dtype=value.dtype)
        by_head = out.transpose(1, 2)
        for (sequence, start, stop, reach), kernel in zip(self.pieces, self.kernels):
            rows, real = slice(start, stop), slice(reach.start, reach.stop)
            earlier = self.keys[sequence, :, real], self.values[sequence, :, real]
            own = key[rows], value[rows]
            if softcap is not None:
                kernel = plain_kernel
            self._merge(by_head[rows], query[rows], earlier, own, reach, kernel, scale, sinks, softcap)
        return out

    def _merge(
        self,
        out: Tensor,
        query: Tensor,
        earlier: tuple[Tensor, Tensor],
        own: tuple[Tensor, Tensor],
        reach: Reach,
        kernel: Kernel,
        scale: float,
        sinks: Tensor | None,
        softcap: float | None,
    ) -> None:
        """Fills ``out`` ``[row, head, n, d_value]``, of the rows of one sequence."""
        group = query.shape[1] // own[0].shape[1]
        own_score = _own_scores(query, own[0], scale, softcap)
        own_value = own[1].repeat_interleave(group, dim=1) if group > 1 else own[1]
        first = reach.start + 1
        # a branch without earlier keys; at padding anything will do that is finite
        out[:, :, :first] = own_value[:, :, :first]
        out[:, :, reach.stop :] = own_value[:, :, reach.stop :]
        total = own_score
        if reach.stop > first and reach.window != 1:
            later = slice(first, reach.stop)
            bias = None if reach.bias is None else reach.bias[1:, :-1]
            options = {"scale": scale, "window": max(reach.window - 1, 0), "bias": bias}
            if kernel is plain_kernel:
                options |= {"softcap": softcap, "scores_at_once": self.scores_at_once}
            read, lse = kernel(query[:, :, later], earlier[0][:, :-1], earlier[1][:, :-1], **options)
            if reach.reads is not None:
                lse = lse.masked_fill(~reach.reads[1:], float("-inf"))
            share = torch.sigmoid(own_score[:, :, later] - lse).unsqueeze(-1).to(read.dtype)
            out[:, :, later] = torch.lerp(read, own_value[:, :, later].to(read.dtype), share)
            if sinks is not None:
                total = own_score.clone()
                total[:, :, later] = torch.logaddexp(own_score[:, :, later], lse)
        elif reach.stop > first:
            out[:, :, first : reach.stop] = own_value[:, :, first : reach.stop]
        if sinks is not None:
            out *= torch.sigmoid(total - sinks.view(1, -1, 1)).unsqueeze(-1).to(out.dtype)


def _own_scores(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
    """``[row, head, n]``, in float32 at least."""
    n_rows, n_heads, n, width = query.shape
    # shape: (row, kv_head, group, n, d) with (row, kv_head, 1, n, d)
    grouped = query.view(n_rows, key.shape[1], -1, n, width) * key.unsqueeze(2)
    scores = grouped.sum(-1, dtype=wide(query.dtype)).view(n_rows, n_heads, n) * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
