"""Log-probabilities of target tokens, and the mean of several routes' predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_interp.routes.plan import score_dtype

_ROWS = 16  # of logits at a time on a processor, which stay in its cache
_WIDE_BYTES = 2**26  # of logits at the width of scores at a time elsewhere


def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """``[..., vocab]`` and ``[..., target]`` ids to log-probabilities ``[..., target]``, at float32 at least.

    ``logit[target] - log sum exp(logits)``, in nats. Logits of a lower precision are widened a few rows at a time.
    """
    dtype, n = score_dtype(logits), _rows_at_once(logits)
    rows = zip(logits.reshape(-1, logits.shape[-1]).split(n), targets.reshape(-1, targets.shape[-1]).split(n))
    found = [row.log_softmax(dim=-1, dtype=dtype).gather(-1, ids) for row, ids in rows]
    return torch.cat(found).view(targets.shape) if found else logits.new_empty(targets.shape, dtype=dtype)


def _rows_at_once(logits: Tensor) -> int:
    return _ROWS if logits.is_cpu else max(1, _WIDE_BYTES // (logits.shape[-1] * score_dtype(logits).itemsize))


def averaged_log_probs(logits: Tensor, targets: Tensor, averaged: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of routes, and the entropy of the mean prediction of some of a token's.

    Args:
        logits: ``[token, route, vocab]``.
        targets: ``[token, target]`` ids.
        averaged: ``[token, route]`` bool, whose predictions are averaged.

    Returns:
        Log-probabilities ``[token, route, target]``, and entropies ``[token]`` in nats; NaN where nothing is averaged.
    """
    if not logits.is_cpu:
        return averaged_without_waiting(logits, targets, averaged)
    if not bool(averaged.any()):
        nothing = logits.new_full((len(logits),), float("nan"), dtype=score_dtype(logits))
        return log_probs(logits, targets.unsqueeze(1).expand(-1, logits.shape[1], -1)), nothing
    scores, sums = _row_by_row(logits, targets, averaged)
    return scores, _entropy_of_sums(sums, averaged)


def averaged_without_waiting(logits: Tensor, targets: Tensor, averaged: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`averaged_log_probs`, without looking at values on the host."""
    n = max(1, _rows_at_once(logits) // logits.shape[1])
    scores, entropies = [], []
    for some, ids, flags in zip(logits.split(n), targets.split(n), averaged.split(n)):
        log = some.log_softmax(dim=-1, dtype=score_dtype(logits))
        scores.append(log.gather(-1, ids.unsqueeze(1).expand(-1, log.shape[1], -1)))
        sums = log.exp_().masked_fill_(~flags.unsqueeze(-1), 0.0).sum(dim=1)
        entropies.append(_entropy_of_sums(sums, flags))
    return torch.cat(scores), torch.cat(entropies)


def fused_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """As :func:`log_probs`, to be compiled: one pass over the logits then, and nothing of their size is written."""
    wide = logits.to(score_dtype(logits))
    return wide.gather(-1, targets) - wide.logsumexp(dim=-1, keepdim=True)


def fused_averages(logits: Tensor, targets: Tensor, averaged: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`averaged_log_probs`, to be compiled."""
    wide = logits.to(score_dtype(logits))
    total = wide.logsumexp(dim=-1, keepdim=True)
    scores = wide.gather(-1, targets.unsqueeze(1).expand(-1, logits.shape[1], -1)) - total
    sums = torch.where(averaged.unsqueeze(-1), (wide - total).exp(), 0.0).sum(dim=1)
    return scores, mean_entropy(sums / averaged.sum(dim=-1, keepdim=True))


def _entropy_of_sums(sums: Tensor, averaged: Tensor) -> Tensor:
    """``[token]``, of the mean of ``[token, vocab]`` summed predictions; NaN (0 / 0) where nothing is averaged."""
    return mean_entropy(sums.div_(averaged.sum(dim=-1, keepdim=True)))


def mean_entropy(mean: Tensor) -> Tensor:
    """The entropy of a distribution ``[..., vocab]``, in nats."""
    return torch.special.entr(mean).sum(dim=-1)


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
