"""The attention of a grid's rows beside a softmax written out for each branch, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_interp.engine.grid import kernels
from moe_interp.engine.grid.attention import GridKeys, SequenceMask
from moe_interp.engine.grid.kernels import kernel_for, plain_kernel

POS, HEADS, D_KEY, D_VALUE = 9, 4, 6, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape) + seed))


def written_out(
    query: Tensor, key: Tensor, value: Tensor, earlier: tuple[Tensor, Tensor], added: Tensor, scale: float,
    sinks: Tensor | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """``[row, pos, head, d]``: one softmax a branch. ``added`` ``[pos, pos]`` is for the scores of earlier keys."""
    n_rows, n_heads, n, _ = query.shape
    group = n_heads // key.shape[1]
    out = query.new_zeros(n_rows, n, n_heads, value.shape[-1])
    for row in range(n_rows):
        for head in range(n_heads):
            at = head // group
            for p in range(n):
                keys = torch.cat([earlier[0][at, :p], key[row, at, p : p + 1]])
                values = torch.cat([earlier[1][at, :p], value[row, at, p : p + 1]])
                scores = scale * (keys @ query[row, head, p])
                scores = scores if softcap is None else softcap * (scores / softcap).tanh()
                scores = scores + torch.cat([added[p, :p], scores.new_zeros(1)])
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head : head + 1]])
                out[row, p, head] = scores.softmax(-1)[: p + 1] @ values
    return out


def hidden(rule: Any) -> Tensor:
    """``[pos, pos]``: 0 where query i reads key j, -inf elsewhere."""
    i, j = torch.meshgrid(torch.arange(POS), torch.arange(POS), indexing="ij")
    return torch.zeros(POS, POS, dtype=torch.float64).masked_fill(~rule(i, j), float("-inf"))


def with_bias(start: int, stop: int, rule: Any, slope: float = 0.0) -> SequenceMask:
    """A reach by a bias, of real positions ``start..stop``."""
    i, j = torch.meshgrid(torch.arange(start, stop), torch.arange(start, stop), indexing="ij")
    reads = rule(i, j) & (j < i)
    bias = (slope * (j - i).double()).masked_fill(~reads, kernels.NEVER)
    some = reads.any(-1)
    return SequenceMask(start, stop, 0, bias.masked_fill(~some.unsqueeze(-1), 0.0), some)


def tensors(kv_heads: int, n_rows: int) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    own = random(n_rows, HEADS, POS, D_KEY), random(n_rows, kv_heads, POS, D_KEY, seed=1)
    earlier = random(2, kv_heads, POS, D_KEY, seed=2), random(2, kv_heads, POS, D_VALUE, seed=3)
    return *own, random(n_rows, kv_heads, POS, D_VALUE, seed=4), earlier


CASES = {
    "causal": (SequenceMask(0, POS), lambda i, j: j <= i, 0.0),
    "window": (SequenceMask(0, POS, 3), lambda i, j: i - j < 3, 0.0),
    "window of the token alone": (SequenceMask(0, POS, 1), lambda i, j: j == i, 0.0),
    "window of two": (SequenceMask(0, POS, 2), lambda i, j: i - j < 2, 0.0),
    "padding on the left": (SequenceMask(3, POS), lambda i, j: j >= 3, 0.0),
    "padding on the right": (SequenceMask(0, 6), lambda i, j: j <= i, 0.0),
    "padding and window": (SequenceMask(2, 8, 3), lambda i, j: (j >= 2) & (i - j < 3), 0.0),
    "one real token": (SequenceMask(4, 5), lambda i, j: j == i, 0.0),
    "two real tokens": (SequenceMask(4, 6), lambda i, j: j >= 4, 0.0),
    "chunks": (with_bias(0, POS, lambda i, j: i // 4 == j // 4), lambda i, j: i // 4 == j // 4, 0.0),
    "a slope": (with_bias(1, POS, lambda i, j: j >= 1, 0.3), lambda i, j: j >= 1, 0.3),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_one_softmax_a_branch(case: str, kv_heads: int, has_sinks: bool) -> None:
    reach, rule, slope = CASES[case]
    query, key, value, earlier = tensors(kv_heads, 5)
    sinks = random(HEADS, seed=5) if has_sinks else None
    # rows 0 and 1 are of sequence 1, the others of sequence 0, which reads all earlier keys
    keys = GridKeys(*earlier, [(1, 0, 2, reach), (0, 2, 5, SequenceMask(0, POS))], 1)
    found = keys.attend(query, key, value, 0.4, sinks, None)
    place = torch.arange(POS, dtype=torch.float64)
    added = hidden(rule) + slope * (place - place.unsqueeze(1))
    own = (query[:2], key[:2], value[:2])
    expected = written_out(*own, (earlier[0][1], earlier[1][1]), added, 0.4, sinks)
    real = slice(reach.start, reach.stop)
    assert float((found[:2, real] - expected[:, real]).abs().max()) <= 1e-13
    assert bool(found.isfinite().all())
    others = (query[2:], key[2:], value[2:])
    expected = written_out(*others, (earlier[0][0], earlier[1][0]), hidden(lambda i, j: j <= i), 0.4, sinks)
    assert float((found[2:] - expected).abs().max()) <= 1e-13


def test_a_soft_cap() -> None:
    query, key, value, earlier = tensors(2, 3)
    found = GridKeys(*earlier, [(0, 0, 3, SequenceMask(0, POS))], 10**6).attend(query, key, value, 2.0, None, 1.5)
    added = hidden(lambda i, j: j <= i)
    expected = written_out(query, key, value, (earlier[0][0], earlier[1][0]), added, 2.0, softcap=1.5)
    assert float((found - expected).abs().max()) <= 1e-13
    plain = GridKeys(*earlier, [(0, 0, 3, SequenceMask(0, POS))], 10**6).attend(query, key, value, 2.0, None, None)
    assert float((found - plain).abs().max()) > 0.01


@pytest.mark.parametrize("size", [1.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_number_formats_also_where_scores_are_far_apart(dtype: torch.dtype, size: float) -> None:
    query, key, value, earlier = tensors(2, 3)
    query = (size * query).to(dtype)
    key, value, earlier = key.to(dtype), value.to(dtype), (earlier[0].to(dtype), earlier[1].to(dtype))
    found = GridKeys(*earlier, [(0, 0, 3, SequenceMask(0, POS))], 10**6).attend(query, key, value, 0.1, None, None)
    wide = [each.double() for each in (query, key, value)]
    added = hidden(lambda i, j: j <= i)
    expected = written_out(*wide, (earlier[0][0].double(), earlier[1][0].double()), added, 0.1)
    assert found.dtype == dtype
    if size == 1.0:
        assert float((found - expected).abs().max()) <= 60 * torch.finfo(dtype).eps
    else:  # rounding a score of hundreds moves shares: what stays is a mean of values
        assert float((found - expected).abs().median()) <= 60 * torch.finfo(dtype).eps
        assert bool(found.isfinite().all())


@pytest.mark.parametrize("kind", ["causal", "window", "bias"])
def test_the_processor_s_kernel_is_taken_where_it_gives_the_same(kind: str) -> None:
    cpu = torch.device("cpu")
    assert kernel_for(cpu, torch.float32, 8, 8, kind) is kernels._flash_on_processor
    assert kernel_for(cpu, torch.float32, 8, 6, kind) is plain_kernel  # values narrower than keys


@pytest.mark.parametrize("fault", ["error", "output", "log-sum-exp", "shape"])
def test_a_kernel_that_gives_something_else_is_not_taken(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = plain_kernel(*args, **options)
        if fault == "error":
            raise RuntimeError("no such kernel")
        return {"output": (1.01 * out, lse), "log-sum-exp": (out, lse + 0.01), "shape": (out, lse[..., :-1])}[fault]

    monkeypatch.setattr(kernels, "_KERNELS", {"cpu": (faulty,)})
    cpu = torch.device("cpu")
    assert kernel_for.__wrapped__(cpu, torch.float32, 8, 8, "causal") is plain_kernel


def test_memory_that_runs_out_in_a_kernel_s_trial_is_no_verdict_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernels, "_KERNELS", {"cpu": (full,)})
    with pytest.raises(torch.OutOfMemoryError):
        kernel_for.__wrapped__(torch.device("cpu"), torch.float32, 8, 8, "causal")


@pytest.mark.parametrize("scores_at_once", [1, 700, 10**9])
def test_rows_a_few_at_a_time(scores_at_once: int) -> None:
    query, key, value = random(6, 4, POS, D_KEY), random(2, POS, D_KEY), random(2, POS, D_VALUE)
    options: dict[str, Any] = {"scale": 0.3, "window": 4}
    whole = plain_kernel(query, key, value, **options)
    parts = plain_kernel(query, key, value, **options, scores_at_once=scores_at_once)
    assert all(float((a - b).abs().max()) <= 1e-14 for a, b in zip(whole, parts))
