"""Kernels that do causal attention of many rows over the same keys, and also give the log-sum-exp of its scores.

Before its first use a kernel is compared with :func:`plain_kernel`, which runs everywhere, on a few random numbers. A
kernel that the build, the card or the width lacks, or that differs, is not used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moe_interp.engine.memory import is_out_of_memory

NEVER = -1e30
"""Added to a score: a share that vanishes, and a product with it that does not overflow."""
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}

Kernel = Callable[..., tuple[Tensor, Tensor]]
"""Attention of queries ``[row, head, n, d]`` over keys and values ``[kv_head, n, d]`` that all rows read.

Query i reads key j where ``i - window < j <= i`` (no window where that is 0), or as an added ``bias`` ``[n, n]`` says.
Gives the output ``[row, head, n, d_value]`` and the log-sum-exp ``[row, head, n]``."""


def score_format(dtype: torch.dtype) -> torch.dtype:
    """The number format of scores: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def plain_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int = 0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scores_at_once: int = 2**26,
) -> tuple[Tensor, Tensor]:
    """Attention by a product, a mask and a softmax, in float32 at least, a few rows at a time."""
    n_heads, n = query.shape[1:3]
    n_kv, dtype = key.shape[0], score_format(query.dtype)
    key, value = key.to(dtype), value.to(dtype)
    added = bias.to(dtype) if bias is not None else _triangle(n, window, dtype, query.device)
    outs, sums = [], []
    for rows in query.split(max(1, scores_at_once // (n_heads * n * n))):
        # shape: (row, kv_head * group, n, d) -> (kv_head, row * group * n, d)
        q = (
            rows.to(dtype)
            .view(len(rows), n_kv, -1, n, rows.shape[-1])
            .transpose(0, 1)
            .reshape(n_kv, -1, rows.shape[-1])
        )
        scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, key.transpose(1, 2), beta=0, alpha=scale)
        scores = scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)
        scores = scores.view(n_kv, -1, n, n).add_(added)
        lse = scores.logsumexp(dim=-1)
        out = torch.bmm(scores.sub_(lse.unsqueeze(-1)).exp_().view(n_kv, -1, n), value)
        # shape: (kv_head, row * group * n, d) -> (row, head, n, d)
        outs.append(out.view(n_kv, len(rows), -1, n, out.shape[-1]).transpose(0, 1).flatten(1, 2))
        sums.append(lse.view(n_kv, len(rows), -1, n).transpose(0, 1).flatten(1, 2))
    return torch.cat(outs).to(query.dtype), torch.cat(sums)


def _triangle(n: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[n, n]``: 0 where query i reads key j, a very small number elsewhere."""
    place = torch.arange(n, device=device)
    back = place.unsqueeze(1) - place
    hidden = back < 0 if not window else (back < 0) | (back >= window)
    return torch.zeros(n, n, dtype=dtype, device=device).masked_fill_(hidden, NEVER)


def _over_rows(values: Tensor, n_rows: int, n_heads: int) -> Tensor:
    """``[kv_head, n, d]`` as ``[row, head, n, d]``, without a copy a row."""
    group = n_heads // values.shape[0]
    each = values.repeat_interleave(group, dim=0) if group > 1 else values
    return each.expand(n_rows, -1, -1, -1)


def _flash_on_cuda(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int = 0, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Flash attention, also of a window; widths are padded to what it takes, and values to the width of keys."""
    d_key, d_value = key.shape[-1], value.shape[-1]
    width = -(-max(d_key, d_value) // 8) * 8
    query, key, value = (
        each if each.shape[-1] == width else torch.nn.functional.pad(each, (0, width - each.shape[-1]))
        for each in (query, key, value)
    )
    n = query.shape[2]
    # shape: (row, n, head, d)
    over = [each.transpose(0, 1).expand(len(query), -1, -1, -1) for each in (key, value)]
    sides = {"window_size_left": window - 1, "window_size_right": 0} if window else {}
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query.transpose(1, 2), *over, None, None, n, n, 0.0, True, False, scale=scale, **sides
    )
    return out.transpose(1, 2)[..., :d_value], lse[..., :n]


def _efficient_on_cuda(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int = 0, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Memory-efficient attention, by a mask where that is more than causal."""
    n_rows, n_heads, n, _ = query.shape
    added = None
    if bias is not None or window:
        added = _triangle(n, window, query.dtype, query.device) if bias is None else bias.to(query.dtype)
        # rows of the mask must begin at addresses that the kernel can read
        padded = torch.nn.functional.pad(added.clamp(min=torch.finfo(query.dtype).min), (0, -n % 16))
        added = padded[:, :n].expand(n_rows, n_heads, n, n)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, _over_rows(key, n_rows, n_heads), _over_rows(value, n_rows, n_heads), added, True, 0.0, added is None,
        scale=scale,
    )  # fmt: skip
    return out, lse[..., :n]


def _flash_on_processor(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int = 0, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The processor's flash attention, by a mask where that is more than causal."""
    n_rows, n_heads, n, _ = query.shape
    added = None
    if bias is not None or window:
        added = _triangle(n, window, query.dtype, query.device) if bias is None else bias
        added = added.to(query.dtype).clamp(min=torch.finfo(query.dtype).min)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, _over_rows(key, n_rows, n_heads), _over_rows(value, n_rows, n_heads), 0.0, added is None,
        attn_mask=added, scale=scale,
    )  # fmt: skip


_KERNELS: dict[str, tuple[Kernel, ...]] = {"cuda": (_flash_on_cuda, _efficient_on_cuda), "cpu": (_flash_on_processor,)}
_WITHOUT_BIAS = (_flash_on_cuda,)


@cache
def kernel_for(device: torch.device, dtype: torch.dtype, d_key: int, d_value: int, kind: str) -> Kernel:
    """The first of a device's kernels that equals :func:`plain_kernel` on a few random numbers; else the plain one.

    Args:
        device, dtype: Of the keys.
        d_key, d_value: Their width, and that of the values.
        kind: What queries read: ``"causal"``, ``"window"`` or ``"bias"``.
    """
    for kernel in _KERNELS.get(device.type, ()):
        if not (kind == "bias" and kernel in _WITHOUT_BIAS) and _is_exact(kernel, device, dtype, d_key, d_value, kind):
            return kernel
    return plain_kernel


def _is_exact(kernel: Kernel, device: torch.device, dtype: torch.dtype, d_key: int, d_value: int, kind: str) -> bool:
    draw, n = torch.Generator().manual_seed(0), 19

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(device, dtype)

    query, key, value = random(2, 4, n, d_key), random(2, n, d_key), random(2, n, d_value)
    options: dict[str, Any] = {"scale": d_key**-0.5, "window": 5 if kind == "window" else 0}
    if kind == "bias":
        options["bias"] = _triangle(n, 7, score_format(dtype), device) + 0.5 * random(n, n).to(score_format(dtype))
    expected = plain_kernel(query, key, value, **options)
    try:
        found = kernel(query, key, value, **options)
        pairs = list(zip(found, expected))
        return all(a.shape == b.shape and bool((a - b).abs().max() <= _TOLERANCE[dtype]) for a, b in pairs)
    except Exception as error:  # this build, card or width lacks the kernel
        if is_out_of_memory(error):
            raise
        return False
