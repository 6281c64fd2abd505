"""The faster product: equal to torch's own, and only where it may be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_interp.engine.cpu import matmul
from moe_interp.engine.cpu.matmul import linear


@pytest.fixture(autouse=True)
def wherever_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on processors where it is not the faster one."""
    monkeypatch.setattr(matmul, "ONEDNN_IS_FASTER", matmul.HAS_ONEDNN)


SHAPES = [(64, 256, 512), (37, 300, 515), (8, 2048, 128), (4096, 32, 40), (1, 512, 4096)]


def wide_calls(call: Callable[[], Any]) -> int:
    """How many products oneDNN does in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.count for event in profile.key_averages() if event.key == "mkldnn::_linear_pointwise")


@pytest.mark.parametrize(("rows", "d_in", "d_out"), SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_is_exact_to_rounding(rows: int, d_in: int, d_out: int, has_bias: bool, transposed: bool) -> None:
    x = torch.randn(2, rows, d_in + 3)[..., 1:-2]
    weight = torch.randn(d_in, d_out).t() if transposed else torch.randn(d_out, d_in)
    bias = torch.randn(d_out) if has_bias else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    with torch.no_grad():
        found = linear(x, weight, bias)
    assert found.shape == exact.shape
    # the bound that holds for any order of summation: d_in u |x| |w|
    bound = (d_in + 1) * torch.finfo(torch.float32).eps / 2 * (x.abs().double() @ weight.abs().double().t() + 1)
    assert bool(((found - exact).abs() <= bound).all())


def test_takes_the_wide_product_where_the_machine_has_one() -> None:
    x, weight = torch.randn(64, 256), torch.randn(512, 256)

    def call() -> None:
        with torch.no_grad():
            linear(x, weight)

    assert wide_calls(call) == int(matmul.HAS_ONEDNN)


# torch's own, at any use of its switch, and at a process's first sparse tensor
@pytest.mark.filterwarnings("ignore:TF32 acceleration", "ignore:Sparse CSR tensor support")
def test_leaves_everything_else_to_torch() -> None:
    x, weight = torch.randn(64, 256), torch.randn(512, 256)
    trained = torch.nn.Parameter(torch.randn(512, 256))

    def calls() -> None:
        assert linear(x, trained).requires_grad
        with torch.no_grad():
            linear(x.double(), weight.double())
            linear(x.bfloat16(), weight.bfloat16())
            linear(x[:4], weight)  # too little to pay
            linear(x[:0], weight)
            for bias in (torch.randn(1024)[::2], torch.randn(1).expand(512), torch.randn(1)):
                assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
            linear(x, weight.to_sparse_csr())
            with FlopCounterMode(display=False) as counter:
                linear(x, weight)
            assert counter.get_total_flops() == 2 * x.numel() * len(weight)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert linear(x, weight).dtype == torch.bfloat16
            with torch.backends.mkldnn.flags(enabled=False):
                linear(x, weight)

    assert wide_calls(calls) == 0


def test_rows_are_padded_to_few_sizes() -> None:
    if not matmul.HAS_ONEDNN:
        assert matmul.padded(101) == 101
        return
    sizes = {n: matmul.padded(n) for n in range(1, 4097)}
    assert all(n <= size <= max(n * 9 / 8, n + 15) for n, size in sizes.items())
    assert len(set(sizes.values())) <= 48


@pytest.mark.parametrize(("maker", "is_intel"), [("GenuineIntel", True), ("AuthenticAMD", False)])
def test_the_maker_decides(maker: str, is_intel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul.Path, "read_text", lambda path: f"vendor_id\t: {maker}\nflags\t: avx512f\n")
    assert matmul._is_intel() == is_intel

    def absent(path: object) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(matmul.Path, "read_text", absent)
    monkeypatch.setattr(matmul.platform, "processor", lambda: f"Intel64 Family 6, {maker}")
    assert matmul._is_intel() == is_intel
