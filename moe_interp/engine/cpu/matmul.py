"""Matrix products on a processor, by the faster of the two libraries that torch carries."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor, nn

_FROM_WORK = 2**20  # multiplications: for fewer, a call to oneDNN costs more than it saves
_FEW_ROWS = 8
_STEP = 16
_PLAIN = (Tensor, nn.Parameter)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, equal to rounding, for passes without gradients.

    torch multiplies float32 with MKL, which leaves AVX-512 unused on processors of other makers than Intel. There
    oneDNN, which uses it, is taken; on Intel's, MKL is as fast, without compiling or padding.
    ``torch.backends.mkldnn.flags(enabled=False)`` switches it off (torch then warns of TF32, to no effect).

    Args:
        rows: ``[..., d_in]``.
        weight: ``[d_out, d_in]``.
        bias: ``[d_out]``.

    Returns:
        ``[..., d_out]``.
    """
    if not (is_faster(rows, weight) and _is_plain(bias, weight)):
        return nn.functional.linear(rows, weight, bias)
    flat = rows.reshape(-1, rows.shape[-1])
    if missing := padded(len(flat)) - len(flat):
        flat = nn.functional.pad(flat, (0, 0, 0, missing))
    out = torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "")
    return (out[:-missing] if missing else out).view(*rows.shape[:-1], -1)


def padded(n_rows: int) -> int:
    """The number of rows that a product of ``n_rows`` is done with: the next multiple of 16, from 256 on coarser.

    At most an eighth more, from 256 on. oneDNN compiles code for every number of rows and every shape of weights, and
    keeps it: see ``COMPILED_BYTES`` of :mod:`moe_interp.engine.memory`.
    """
    if not uses_onednn():
        return n_rows
    step = max(1 << max(n_rows.bit_length() - 4, 0), _STEP)
    return -(-n_rows // step) * step


def is_faster(rows: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is to multiply these."""
    return (
        uses_onednn()
        and rows.dtype == weight.dtype == torch.float32
        and rows.device.type == weight.device.type == "cpu"
        and rows.numel() >= _FEW_ROWS * rows.shape[-1]
        and rows.numel() * weight.shape[0] >= _FROM_WORK
        and type(rows) in _PLAIN
        and type(weight) in _PLAIN
        and weight.layout == torch.strided
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == 0  # counters of operations know torch's own product only
    )


def _is_plain(bias: Tensor | None, weight: Tensor) -> bool:
    return bias is None or (
        type(bias) in _PLAIN and bias.dtype == weight.dtype and bias.shape == weight.shape[:1] and bias.is_contiguous()
    )


def uses_onednn() -> bool:
    """Whether this process multiplies large float32 matrices by oneDNN."""
    return ONEDNN_IS_FASTER and bool(torch.backends.mkldnn.enabled)


def _is_intel() -> bool:
    """By the maker's name in the system's list of processors, where it has one."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "GenuineIntel" in platform.processor()


# what a machine has: judged once, so that one process computes alike throughout
HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
ONEDNN_IS_FASTER = HAS_ONEDNN and not _is_intel()
