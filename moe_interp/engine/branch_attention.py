"""Attention of branches over the keys and values that all branches of a sequence share, without a copy a row.

A branch reads the keys and values of its sequence's earlier positions, and its own. With the scores of earlier ones
``s_j = scale q . k_j`` and its own ``s``, both taken against their maximum m, its output is

    (sum_j exp(s_j - m) v_j + exp(s - m) v) / (sum_j exp(s_j - m) + exp(s - m)),

a product of all branches of a sequence with the same keys and the same values. The rest of the attention (projections,
norms, rotation, gates) is the model's own: this is registered with transformers as an attention implementation.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "moe_interp_branches"


class UnknownAttention(Exception):
    """An attention that is more than a softmax over keys, or keys that are not those of the base pass."""


class Piece(NamedTuple):
    """Some rows, of one sequence: all their branches read the keys before ``low``, none those from ``crop`` on."""

    start: int
    stop: int
    sequence: int
    low: int
    crop: int


@dataclass
class Rows:
    """The branches that are running: ``[row, n]`` positions in ``[row]`` sequences.

    Attributes:
        token: ``[row, n]``, index into the flattened ``[batch, pos]``.
        crop: Keys before this position are all that any branch reads.
        block_out: ``[row, n, d_model]``, the output of their layer's experts' block.
        scores_at_once: How many attention scores to hold together, one row's at least.
        gathered: By id of a recorded value (which the recording holds), that value at the branches.
        calls: By name, how often a child of the first layer has been called.
        pieces: By number of heads, the pieces that attention takes one after the other.
        masks: By id of a recorded mask and piece, what is added to the scores of its last keys.
    """

    sequence: Tensor
    position: Tensor
    token: Tensor
    crop: int
    block_out: Tensor
    scores_at_once: int
    gathered: dict[int, Any] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    pieces: dict[int, list[Piece]] = field(default_factory=dict)
    masks: dict[tuple[int, Piece], Tensor] = field(default_factory=dict)


class _Now(threading.local):
    """What runs in a thread: branches, and the keys and values of earlier positions at the layer just asked for."""

    rows: Rows | None = None
    earlier: tuple[Tensor, Tensor] | None = None


_now = _Now()


def offer(rows: Rows, earlier: tuple[Tensor, Tensor]) -> None:
    """What this thread's next attention is to read: the branches, and their base pass's keys and values."""
    _now.rows, _now.earlier = rows, earlier


def forget() -> None:
    """Let go of what a thread's attention was to read, whether it has come to that or not."""
    _now.rows = _now.earlier = None


def branch_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of the running branches, as transformers calls it.

    Args:
        query: ``[row, head, n, d_key]``.
        key, value: The branches' own, ``[row, kv_head, n, d]``.
        attention_mask: The base pass's ``[batch or 1, 1, pos, pos]``; None where every token reads all earlier ones.
        scaling: Of the scores.
        dropout: Not in evaluation.
        s_aux: ``[head]``, scores of sinks: they take a share, and give nothing.
        others: What the mask says already, such as the width of a window.

    Returns:
        ``[row, n, head, d_value]``, and no pattern.

    Raises:
        UnknownAttention: a soft-cap, a bias by position, or keys of another form than the recorded ones.
    """
    rows, earlier = _now.rows, _now.earlier
    forget()
    if rows is None or earlier is None or dropout or any(others.get(name) is not None for name in _BEYOND):
        raise UnknownAttention(f"{sorted(others)}, dropout {dropout}")
    keys, values = earlier
    if keys.shape[1::2] != key.shape[1::2] or values.shape[1::2] != value.shape[1::2]:
        raise UnknownAttention(f"keys {tuple(key.shape)} beside recorded ones {tuple(keys.shape)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = []
    for piece in _pieces(rows, query.shape[1]):
        here = slice(piece.start, piece.stop)
        before = keys[piece.sequence, :, : piece.crop], values[piece.sequence, :, : piece.crop]
        mask = _mask(rows, piece, attention_mask)
        parts.append(_attend(query[here], before, (key[here], value[here]), mask, scale, s_aux))
    return torch.cat(parts), None


_BEYOND = ("softcap", "position_bias")
AttentionInterface.register(NAME, branch_attention)


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


def _pieces(rows: Rows, n_heads: int) -> list[Piece]:
    if n_heads not in rows.pieces:
        rows.pieces[n_heads] = list(_cut(rows, n_heads))
    return rows.pieces[n_heads]


def _cut(rows: Rows, n_heads: int) -> Iterator[Piece]:
    """Rows in their order, as many of one sequence at a time as their scores fit."""
    low, end = rows.position.amin(dim=-1).tolist(), rows.position.amax(dim=-1).tolist()
    sequence, n = rows.sequence.tolist(), rows.position.shape[1]
    most = rows.scores_at_once // (n_heads * n)
    start = 0
    for i in range(1, len(end) + 1):
        fits = i < len(end) and sequence[i] == sequence[start] and (i + 1 - start) * max(end[start : i + 1]) <= most
        if not fits:
            # the first token reads itself only: a key that is hidden from it spares a special case
            yield Piece(start, i, sequence[start], min(low[start:i]), max(1, *end[start:i]))
            start = i


def _mask(rows: Rows, piece: Piece, base_mask: Tensor | None) -> Tensor:
    """``[row * n, width]``: 0, or the least number at keys that a branch's token did not read before its position."""
    if (id(base_mask), piece) not in rows.masks:
        position = rows.position[piece.start : piece.stop].reshape(-1, 1)
        # without a mask of the base pass's, every key before the piece's first position is read by all
        low = piece.low if base_mask is None else 0
        is_hidden = torch.arange(low, piece.crop, device=position.device) >= position
        mask = torch.zeros(is_hidden.shape, dtype=rows.block_out.dtype, device=position.device)
        if base_mask is not None:
            here = base_mask[piece.sequence if len(base_mask) > 1 else 0, 0, :, : piece.crop][position[:, 0]]
            if here.dtype == torch.bool:
                is_hidden |= ~here
            else:
                mask = here
        rows.masks[id(base_mask), piece] = mask.masked_fill(is_hidden, torch.finfo(mask.dtype).min)
    return rows.masks[id(base_mask), piece]
