"""Random numbers that belong to a token, not to a call: the same however the token is batched or padded."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_interp.types import Layer

# 64-bit constants of the splitmix64 generator (Steele, Lea and Flood, 2014), as signed integers
_GAMMA = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def uniform_keys(position: Tensor, n: int, *labels: int | Tensor) -> Tensor:
    """Uniform numbers in (0, 1), ``[*position.shape, n]``, fixed by position and labels.

    Args:
        position: Integer positions, any shape.
        n: Numbers a position.
        labels: Integers, or integer tensors that broadcast with ``position``: seed, layer, sequence, ...
    """
    state = _mix(position.long())
    for label in labels:
        # a plain number goes along with the operation: a tensor of it would have to be copied to the device
        part = label if isinstance(label, int) else torch.as_tensor(label, dtype=torch.int64, device=position.device)
        state = _mix(state ^ part)  # not state ^ _mix(part): position and seed could then change places
    column = torch.arange(1, n + 1, device=position.device)
    bits = _mix(state.unsqueeze(-1) + column * _GAMMA)
    # the upper 52 bits, centred in their cell, so that neither 0 nor 1 comes out
    return (((bits >> 12) & ((1 << 52) - 1)).double() + 0.5) / float(1 << 52)


def layer_labels(layer: Layer) -> tuple[int, int]:
    """A layer as labels of a stream: (stack, index); the same whichever layers are attached."""
    stack, index = layer if isinstance(layer, tuple) else ("", layer)
    return ("", "encoder", "decoder").index(stack), index


def _mix(z: Tensor) -> Tensor:
    z = z + _GAMMA
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of a signed integer."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
