"""Attention of branches over the keys and values that all branches of a sequence share, without a copy a row.

The rest of the attention (projections, norms, rotation, gates) is the model's own: :func:`branch_attention` is
registered with transformers as an attention implementation. The recorded keys are passed to it in the place of the
attention mask, as an :class:`EarlierKeys`; for compact rows that is a :class:`SharedKeys`.

A branch reads the keys and values of its sequence's earlier positions, and its own. With the scores of earlier ones
``s_j = scale q . k_j`` and its own ``s``, both taken against their maximum m, its output is

    (sum_j exp(s_j - m) v_j + exp(s - m) v) / (sum_j exp(s_j - m) + exp(s - m)),

a product of all branches of a sequence with the same keys and the same values.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface

from moe_interp.engine.branch_rows import CompactRows, RowsCache
from moe_interp.engine.recorded_pass import RecordedPass

NAME = "moe_interp_branches"


class UnknownAttention(Exception):
    """An attention that is more than a softmax over keys, or keys that are not those of the base pass."""


class EarlierKeys(ABC):
    """The recorded keys and values that branches read in a layer; passed to its attention as the mask.

    Attributes:
        keys, values: The base pass's, ``[batch, kv_head, pos, d]``.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, sinks: Tensor | None, softcap: float | None
    ) -> Tensor:
        """The attention's output ``[row, n, head, d_value]``.

        Args:
            query: ``[row, head, n, d_key]``.
            key, value: The branches' own, ``[row, kv_head, n, d]``.
            scale: Of the scores.
            sinks: ``[head]``, scores that take a share, and give nothing.
            softcap: Scores become ``softcap * tanh(score / softcap)``.

        Raises:
            UnknownAttention: attention of a form that is not implemented.
        """


def branch_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of the running branches, as transformers calls it.

    Args:
        module: The model's attention.
        query: ``[row, head, n, d_key]``.
        key, value: The branches' own, ``[row, kv_head, n, d]``.
        attention_mask: The :class:`EarlierKeys` of the branches.
        scaling: Of the scores.
        dropout: Not in evaluation.
        s_aux: ``[head]``, scores of sinks.
        softcap: See :meth:`EarlierKeys.attend`.
        others: What the mask says already, such as the width of a window.

    Returns:
        ``[row, n, head, d_value]``, and no pattern.

    Raises:
        UnknownAttention: no branches, a bias by position, or keys of another form than the recorded ones.
    """
    earlier = attention_mask
    if not isinstance(earlier, EarlierKeys) or dropout or others.get("position_bias") is not None:
        raise UnknownAttention(f"{type(earlier).__name__}, {sorted(others)}, dropout {dropout}")
    if earlier.keys.shape[1::2] != key.shape[1::2] or earlier.values.shape[1::2] != value.shape[1::2]:
        raise UnknownAttention(f"keys {tuple(key.shape)} beside recorded ones {tuple(earlier.keys.shape)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return earlier.attend(query, key, value, scale, s_aux, softcap), None


AttentionInterface.register(NAME, branch_attention)


class Piece(NamedTuple):
    """Rows of one sequence: all their branches read the keys before ``low``, and none reads a key from ``crop`` on."""

    start: int
    stop: int
    sequence: int
    low: int
    crop: int


class RowsOverSharedKeys(CompactRows):
    """Compact rows that read their sequence's keys where they are.

    Attributes:
        scores_at_once: How many attention scores to hold together, one row's at least.
    """

    def __init__(
        self, base: RecordedPass, sequence: Tensor, position: Tensor, block_out: Tensor, scores_at_once: int
    ) -> None:
        super().__init__(base, sequence, position, block_out)
        self.scores_at_once = scores_at_once
        self._pieces: dict[int, list[Piece]] = {}  # by number of heads
        self._added: dict[tuple[int | None, Piece], Tensor] = {}

    def cache(self) -> RowsCache:
        return RowsCache(self)

    def attention_mask(self, layer: int) -> Any:
        recorded = self.base.cache.recorded.get(layer)
        return None if recorded is None else SharedKeys(self, layer, *recorded)

    def pieces(self, n_heads: int) -> list[Piece]:
        """The rows in the groups that attention computes one after the other."""
        if n_heads not in self._pieces:
            self._pieces[n_heads] = list(self._cut(n_heads))
        return self._pieces[n_heads]

    def _cut(self, n_heads: int) -> Iterator[Piece]:
        """Rows in their order, as many of one sequence at a time as their scores fit."""
        low, end = self.position.amin(dim=-1).tolist(), self.position.amax(dim=-1).tolist()
        sequence, n = self.sequence.tolist(), self.position.shape[1]
        most = self.scores_at_once // (n_heads * n)
        start = 0
        for i in range(1, len(end) + 1):
            fits = i < len(end) and sequence[i] == sequence[start] and (i + 1 - start) * max(end[start : i + 1]) <= most
            if not fits:
                # the first token reads itself only: a key that is hidden from it spares a special case
                yield Piece(start, i, sequence[start], min(low[start:i]), max(1, *end[start:i]))
                start = i

    def score_mask(self, number: int | None, piece: Piece) -> Tensor:
        """``[row * n, width]``, added to scores: 0, or the least number at earlier keys that the token did not read.

        Args:
            number: Of the layer's mask; None where its tokens read all earlier ones.
            piece: The rows.
        """
        if (number, piece) not in self._added:
            base_mask = self.base.arguments.value(number)
            position = self.position[piece.start : piece.stop].reshape(-1, 1)
            # without a mask of the base pass's, every key before the piece's first position is read by all
            low = piece.low if base_mask is None else 0
            is_hidden = torch.arange(low, piece.crop, device=position.device) >= position
            mask = torch.zeros(is_hidden.shape, dtype=self.block_out.dtype, device=position.device)
            if base_mask is not None:
                of_sequence = base_mask[piece.sequence if len(base_mask) > 1 else 0, 0, :, : piece.crop]
                here = of_sequence[position[:, 0]]
                if here.dtype == torch.bool:
                    is_hidden |= ~here
                else:
                    mask = here
            self._added[number, piece] = mask.masked_fill(is_hidden, torch.finfo(mask.dtype).min)
        return self._added[number, piece]


class SharedKeys(EarlierKeys):
    """Keys of compact rows: a product with the keys that a piece of rows may read, and a mask.

    Args:
        rows: The rows.
        layer: The layer.
        keys, values: Its recorded ones.
    """

    def __init__(self, rows: RowsOverSharedKeys, layer: int, keys: Tensor, values: Tensor) -> None:
        super().__init__(keys, values)
        number = rows.base.arguments.number(layer, "attention_mask")
        # none where it only says that real tokens read all earlier ones
        self.rows, self.mask = rows, number if number is not None and rows.base.hides_keys(number) else None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, sinks: Tensor | None, softcap: float | None
    ) -> Tensor:
        if softcap is not None:
            raise UnknownAttention("a soft-cap over shared keys")
        parts = []
        for piece in self.rows.pieces(query.shape[1]):
            here = slice(piece.start, piece.stop)
            before = self.keys[piece.sequence, :, : piece.crop], self.values[piece.sequence, :, : piece.crop]
            mask = self.rows.score_mask(self.mask, piece)
            parts.append(_attend(query[here], before, (key[here], value[here]), mask, scale, sinks))
        return torch.cat(parts)


def _attend(
    query: Tensor,
    before: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    mask: Tensor,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    """Of the rows of a piece, ``[row, n, head, d_value]``.

    Args:
        query: ``[row, head, n, d]``.
        before: Keys and values ``[kv_head, crop, d]``.
        own: Keys and values ``[row, kv_head, n, d]``.
        mask: ``[row * n, width]``, added to the scores of the last ``width`` keys.
        scale: Of the scores.
        sinks: ``[head]``.
    """
    n_rows, n_heads, n, _ = query.shape
    n_kv = before[0].shape[0]

    def by_head(values: Tensor) -> Tensor:
        # shape: (row, kv_head * group, n, d) -> (kv_head, group, row * n, d); the group of keys is 1
        grouped = values.view(n_rows, n_kv, -1, n, values.shape[-1]).permute(1, 2, 0, 3, 4)
        return grouped.reshape(n_kv, grouped.shape[1], n_rows * n, -1)

    q, own_k, own_v = by_head(query), by_head(own[0]), by_head(own[1])
    scores = torch.baddbmm(q.new_zeros(1, 1, 1), q.flatten(1, 2), before[0].transpose(1, 2), beta=0, alpha=scale)
    scores = scores.view(*q.shape[:3], -1)
    scores[..., scores.shape[-1] - mask.shape[1] :] += mask
    own_scores = (q * own_k).sum(dim=-1, keepdim=True) * scale
    most = torch.maximum(scores.amax(dim=-1, keepdim=True), own_scores)
    if sinks is not None:
        sink_scores = sinks.view(n_kv, -1, 1, 1)
        most = torch.maximum(most, sink_scores)
    # a share that vanishes beside the largest is not made smaller than any number: processors are slow at those
    least = 1 + math.log(torch.finfo(query.dtype).tiny)
    shares, own_share = scores.sub_(most).clamp_(min=least).exp_(), (own_scores - most).clamp(min=least).exp()
    total = shares.sum(dim=-1, keepdim=True) + own_share
    if sinks is not None:
        total += (sink_scores - most).exp()
    own_out = own_share * own_v
    read = torch.bmm(shares.flatten(1, 2), before[1]).view(own_out.shape)
    out = own_out.add_(read).div_(total)
    # shape: (kv_head, group, row * n, d) -> (row, n, head, d)
    return out.view(n_heads, n_rows, n, -1).permute(1, 2, 0, 3)
