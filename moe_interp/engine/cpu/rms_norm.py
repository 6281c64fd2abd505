"""RMS normalization in few passes through memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_interp.arch.modules import is_watched

_TRIED_SIZES = (1e-3, 1.0, 1e3, 1.0)  # of the rows: the first shows what is added to the mean square
_TOLERANCE = 2e-6


def rms_norm(native: Any) -> Callable[[Tensor], Tensor] | None:
    """A module's own ``x / sqrt(mean(x^2) + eps) * weight``, equal to rounding, for float32 without gradients.

    Families write it in six steps, each of which goes through all rows. Known by what it computes: tried on a few rows.

    Args:
        native: A module with one parameter; families add one to it or not. It is called once, unless it is hooked.

    Returns:
        A function of rows ``[..., d]``; None where the module computes something else, or its call does more.
    """
    weight, eps = getattr(native, "weight", None), getattr(native, "variance_epsilon", getattr(native, "eps", None))
    if (
        not isinstance(weight, Tensor)
        or weight.dtype != torch.float32
        or weight.ndim != 1
        or not isinstance(eps, float)
    ):
        return None
    if weight.device.type != "cpu" or len([*native.parameters()]) > 1 or is_watched(native):
        return None
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(1, len(_TRIED_SIZES), len(weight), generator=draw)
    rows *= rows.new_tensor(_TRIED_SIZES).unsqueeze(-1)
    rows[0, -1, 0] *= 1e4  # normed, as large as an entry can be
    with torch.no_grad():
        expected = native(rows)
        for offset in (0.0, 1.0):
            if _is_close(_normed(rows, weight, offset, eps), expected):
                return partial(_normed, weight=weight, offset=offset, eps=eps)
    return None


def _normed(rows: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    scale = weight + offset if offset else weight
    return (rows * norm.square_().div_(rows.shape[-1]).add_(eps).rsqrt_()).mul_(scale)


def _is_close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())
