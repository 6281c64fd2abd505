"""A checksum of tensors that reads every byte where the tensor lies, and is the same on every device.

The bytes of a tensor are read as 32-bit integers ``a[i]``. Each row of 2**14 of them gives
``sum_i w[i] a[i] modulo 2**64`` with fixed odd 64-bit weights: multilinear hashing (Lemire and Kaser, "Strongly
universal string hashing is fast"). Sums of integers do not depend on their order, so every device finds the same. The
rows' sums, 8 bytes for 64 KiB, are hashed by SHA-256. One changed value always changes the sum; several that are not
chosen with the weights in mind cancel with probability 2**-32.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LANES = 2**14
ROWS = 2**8  # at once, on an accelerator: 32 MiB of products


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over a tensor's shape, number format and the sums of its bytes; 64 hexadecimal digits.

    A tensor of a subclass that is made of others (quantised ones) counts by its parts.
    """
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        digest.update(f"{type(tensor).__name__} {context!r}".encode())
        for name in names:
            digest.update(f"{name} {tensor_digest(getattr(tensor, name))}".encode())
    else:
        digest.update(row_sums(tensor).tobytes())
    return digest.hexdigest()


@torch.no_grad()
def row_sums(tensor: Tensor) -> NDArray[np.int64]:
    """``[row]`` sums of a tensor's bytes, the last row shorter."""
    lanes = _lanes(tensor.detach())
    whole = len(lanes) // LANES * LANES
    rows, rest = lanes[:whole].view(-1, LANES), lanes[whole:]
    if lanes.device.type == "cpu":
        by_row = np.einsum("rl,l->r", rows.numpy(), _weights())
        last = np.einsum("l,l->", rest.numpy(), _weights()[: len(rest)])
        return np.append(by_row, last).astype("<i8")
    weights = torch.from_numpy(_weights()).to(lanes.device)
    parts = [(part.long() * weights).sum(dim=-1) for part in rows.split(ROWS)]
    parts.append((rest.long() * weights[: len(rest)]).sum().unsqueeze(0))
    return torch.cat(parts).cpu().numpy().astype("<i8")


def _lanes(tensor: Tensor) -> Tensor:
    """A tensor's bytes as one row of int32, filled up with zeros."""
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    # negated views share their memory with what they are views of
    flat: Any = tensor.resolve_neg().reshape(-1).view(torch.uint8)
    if len(flat) % 4:
        flat = torch.cat([flat, flat.new_zeros(-len(flat) % 4)])
    return (
        flat.view(torch.int32)
        if flat.data_ptr() % 4 == 0 and flat.storage_offset() % 4 == 0
        else flat.clone().view(torch.int32)
    )


@cache
def _weights() -> NDArray[np.int64]:
    """``[lane]`` fixed odd numbers of 64 bits."""
    drawn = hashlib.shake_256(b"weights of the lanes").digest(8 * LANES)
    return np.frombuffer(drawn, dtype="<i8").astype(np.int64) | 1
