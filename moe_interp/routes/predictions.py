"""Log-probabilities of target tokens, and the mean of several routes' predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_interp.routes.plan import score_dtype

_ROWS = 16  # of logits at a time, which stay in the processor's cache


def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """``[..., vocab]`` and ``[..., target]`` ids to log-probabilities ``[..., target]``, at float32 at least."""
    logits = logits.to(score_dtype(logits))
    if logits.is_cuda:
        return logits.gather(-1, targets) - logits.logsumexp(dim=-1, keepdim=True)
    rows = zip(logits.reshape(-1, logits.shape[-1]).split(_ROWS), targets.reshape(-1, targets.shape[-1]).split(_ROWS))
    return torch.cat([row.log_softmax(dim=-1).gather(-1, ids) for row, ids in rows]).view(targets.shape)


def averaged_log_probs(logits: Tensor, targets: Tensor, averaged: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of routes, and the entropy of the mean prediction of some of a token's.

    Args:
        logits: ``[token, route, vocab]``.
        targets: ``[token, target]`` ids.
        averaged: ``[token, route]`` bool, whose predictions are averaged.

    Returns:
        Log-probabilities ``[token, route, target]``, and entropies ``[token]`` in nats; NaN where nothing is averaged.
    """
    if not bool(averaged.any()):
        nothing = logits.new_full((len(logits),), float("nan"), dtype=score_dtype(logits))
        return log_probs(logits, targets.unsqueeze(1).expand(-1, logits.shape[1], -1)), nothing
    scores, sums = (_on_cuda if logits.is_cuda else _row_by_row)(logits, targets, averaged)
    # 0 / 0 where nothing is averaged
    mean = sums.div_(averaged.sum(dim=-1, keepdim=True))
    return scores, mean_entropy(mean)


def mean_entropy(mean: Tensor) -> Tensor:
    """The entropy of a distribution ``[..., vocab]``, in nats."""
    return torch.special.entr(mean).sum(dim=-1)


def _on_cuda(logits: Tensor, targets: Tensor, averaged: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.to(score_dtype(logits))
    total = logits.logsumexp(dim=-1, keepdim=True)
    scores = logits.gather(-1, targets.unsqueeze(1).expand(-1, logits.shape[1], -1)) - total
    probabilities = (logits - total).exp_().masked_fill_(~averaged.unsqueeze(-1), 0.0)
    return scores, probabilities.sum(dim=1)


def _row_by_row(logits: Tensor, targets: Tensor, averaged: Tensor) -> tuple[Tensor, Tensor]:
    dtype = score_dtype(logits)
    scores = logits.new_empty(*logits.shape[:2], targets.shape[-1], dtype=dtype)
    sums = logits.new_zeros(len(logits), logits.shape[-1], dtype=dtype)
    for token, flags in enumerate(averaged.tolist()):
        for start in range(0, len(flags), _ROWS):
            rows = slice(start, start + _ROWS)
            log = logits[token, rows].to(dtype).log_softmax(dim=-1)
            scores[token, rows] = log[:, targets[token]]
            if all(flags[rows]):
                sums[token] += log.exp_().sum(dim=0)
            elif any(flags[rows]):
                sums[token] += log[averaged[token, rows]].exp_().sum(dim=0)
    return scores, sums
