"""Many routes of one token at the last layer: their final states span few directions, so few are unembedded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_RESIDUAL = {torch.float32: 1e-5, torch.float64: 1e-13}


def is_cheaper(n_routes: int, rank: int, width: int, dtype: torch.dtype) -> bool:
    """Whether ``rank`` unembeddings and a combination a route take clearly less arithmetic than one a route."""
    return dtype in _RESIDUAL and n_routes * width > 1.3 * rank * (width + n_routes)


def spanned_logits(unembed: Callable[[Tensor], Tensor], states: Tensor, rank: int) -> Tensor | None:
    """Logits ``[token, route, vocab]`` of final states ``[token, route, width]``, by a basis of each token's states.

    The residual of route r is ``h + sum_e w_re u_e`` with ``u_e`` the experts' outputs, and the final norm scales (and
    centres) it: the states of a token span at most one direction an expert, one for ``h`` and one for the centring.
    The basis is the orthonormal range of the states, from a random sketch (Halko, Martinsson and Tropp 2011), so that
    nothing need be known of the norm. The unembedding must be affine.

    Args:
        unembed: ``[state, width]`` to ``[state, vocab]``.
        states: Final states; routes that do not exist are 0.
        rank: Directions a token, at least.

    Returns:
        The logits, or None where the states do not lie in so small a span.
    """
    n_tokens, n_routes, width = states.shape
    draw = torch.Generator().manual_seed(0)
    sketch = torch.randn(n_routes, rank, generator=draw, dtype=torch.float64).to(states)
    if not bool(states.isfinite().all()):
        return None
    basis = torch.linalg.qr(states.transpose(1, 2) @ sketch).Q
    coordinates = states @ basis
    missed = torch.linalg.vector_norm(states - coordinates @ basis.transpose(1, 2))
    if float(missed) > _RESIDUAL[states.dtype] * float(torch.linalg.vector_norm(states)):
        return None
    bias = unembed(states.new_zeros(1, width))
    directions = unembed(basis.transpose(1, 2).reshape(-1, width)).sub_(bias)
    logits = coordinates @ directions.view(n_tokens, -1, directions.shape[-1])
    return logits.add_(bias) if bool(bias.any()) else logits
