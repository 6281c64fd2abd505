"""Checksums of tensors: every byte counts, in every number format, and nothing large is made."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from moe_interp.experiments.identity.tensors import LANES, row_sums, tensor_digest

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
DTYPES += [torch.float8_e4m3fn, torch.complex64]


def planted(dtype: torch.dtype, shape: tuple[int, ...] = (7, 11, 13)) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_single_bit_of_the_bytes_counts(dtype: torch.dtype) -> None:
    tensor = planted(dtype, (3, 5))
    digests = {tensor_digest(tensor)}
    content = tensor.reshape(-1).view(torch.uint8)
    for byte in range(len(content)):
        for bit in range(8) if dtype is not torch.bool else [0]:
            content[byte] ^= 1 << bit
            digests.add(tensor_digest(tensor))
            content[byte] ^= 1 << bit
    assert len(digests) == 1 + len(content) * (1 if dtype is torch.bool else 8)


def test_sums_agree_with_integers_of_any_size() -> None:
    """Against Python's integers, modulo 2**64, over a length that is no multiple of anything."""
    tensor = torch.randint(-(2**31), 2**31, (2 * LANES + 5,), dtype=torch.int32)
    unit = torch.zeros(LANES, dtype=torch.int32)
    weights = []
    for lane in (0, 1, 4, LANES - 1):
        weights.append(int(row_sums(unit.index_fill(0, torch.tensor([lane]), 1))[0]))
        assert weights[-1] % 2
    assert len(set(weights)) == 4
    for lane, weight in zip((0, 1, 4), weights):
        alone = torch.zeros_like(tensor)
        alone[2 * LANES + lane] = tensor[2 * LANES + lane]
        expected = int(tensor[2 * LANES + lane]) * weight
        assert (int(row_sums(alone)[2]) - expected) % 2**64 == 0


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (LANES,), (LANES + 1,), (5, 2 * LANES)])
def test_an_accelerators_way_gives_the_same(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = planted(torch.bfloat16, shape)
    expected = row_sums(tensor)

    class Elsewhere:
        type = "elsewhere"

    # the way of other devices, run on this one
    device = torch.Tensor.device
    monkeypatch.setattr(torch.Tensor, "device", property(lambda t: Elsewhere()))
    monkeypatch.setattr(torch.Tensor, "to", lambda t, where: t)
    found = row_sums(tensor)
    monkeypatch.setattr(torch.Tensor, "device", device)
    np.testing.assert_array_equal(found, expected)


def test_layout_in_memory_does_not_count_but_shape_and_format_do() -> None:
    tensor = planted(torch.float32)
    turned = tensor.transpose(0, 2).contiguous().transpose(0, 2)
    assert not turned.is_contiguous()
    assert tensor_digest(turned) == tensor_digest(tensor)
    offset = torch.cat([torch.zeros(1, dtype=torch.bfloat16), planted(torch.bfloat16).reshape(-1)])[1:]
    assert tensor_digest(offset.view(7, 11, 13)) == tensor_digest(planted(torch.bfloat16))
    assert tensor_digest(tensor.reshape(7, -1)) != tensor_digest(tensor)
    assert tensor_digest(torch.zeros(4)) != tensor_digest(torch.zeros(4, dtype=torch.int32))
    assert tensor_digest(torch.zeros(3)) != tensor_digest(torch.zeros(4))


def test_changes_that_could_cancel_do_not() -> None:
    tensor = planted(torch.float32, (64, 256))
    signs = tensor.clone()
    signs[0, 1] *= -1
    signs[0, 3] *= -1  # two highest bits of 64
    swapped = tensor.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    rolled = tensor.roll(1)
    all_digests = {tensor_digest(t) for t in (tensor, signs, swapped, rolled, -tensor, tensor * 2, tensor.flip(0))}
    assert len(all_digests) == 7


def test_the_bytes_are_summed_where_they_lie() -> None:
    """No array of the products, which are twice as large as the tensor, is made."""
    tensor = torch.randint(-(2**31), 2**31, (2**22,), dtype=torch.int32).view(torch.bfloat16).view(64, -1)
    tensor_digest(tensor)
    tracemalloc.start()
    tensor_digest(tensor)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < tensor.nbytes / 8
