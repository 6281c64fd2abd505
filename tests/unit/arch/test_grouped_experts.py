"""Experts of all rows by grouped products: equal to the loop and to one token at a time, and nobody waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_interp.arch import grouped_experts, grouped_products
from moe_interp.arch.expert_functions import StackedExperts, StackedFunctions
from moe_interp.arch.grouped_experts import hidden_of_rows, output_of_rows, takes_grouped_products
from moe_interp.arch.grouped_products import can_be_grouped, has_grouped_product, sort_by_expert
from moe_interp.hooks.attach import attach
from tests.tiny import FAMILIES, build_bridge, build_hf

STACKED = [family for family in FAMILIES if family != "switch_transformers"]
N_EXPERTS = 8
# as routers give them, with empty slots; expert 6 has no row
ROUTES = torch.tensor([[0, 1, 2], [3, -1, -1], [-1, -1, -1], [7, 2, 5], [1, 0, -1], [4, 3, 2], [2, 7, 1]])


def experts_of(family: str, dtype: torch.dtype = torch.float32) -> StackedFunctions:
    moe = attach(build_bridge(build_hf(family, dtype=dtype), family))
    functions = moe.spec(moe.layers[-1]).expert_functions
    assert isinstance(functions, StackedFunctions)
    return functions


def width_of(experts: Any) -> int:
    """Of the experts' input, and of their output."""
    down, d_expert = experts.stacks[1], experts.d_expert
    return down.shape[2] if down.shape[1] == d_expert else down.shape[1]


def random_hidden(experts: Any, n_tokens: int, seed: int = 0) -> Tensor:
    like = experts.stacks[0]
    hidden = torch.randn(n_tokens, width_of(experts), generator=torch.Generator().manual_seed(seed))
    return hidden.to(like.dtype)


def at_slots(experts: Any, hidden: Tensor, ids: Tensor, grouped: bool) -> tuple[Tensor, Tensor]:
    """Neurons and outputs ``[token, slot, width]``."""
    order, groups = sort_by_expert(ids.flatten(), N_EXPERTS)
    neurons = hidden_of_rows(experts, hidden[order // ids.shape[1]], groups, grouped)
    outputs = output_of_rows(experts, neurons, groups, hidden.shape[1], grouped)
    place = order.argsort()
    return neurons[place].view(*ids.shape, -1), outputs[place].view(*ids.shape, -1)


def one_at_a_time(experts: Any, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same by one token and one slot after the other."""
    neurons = hidden.new_zeros(*ids.shape, experts.d_expert)
    outputs = hidden.new_zeros(*ids.shape, hidden.shape[1])
    for token, row in enumerate(ids.tolist()):
        for slot, expert in enumerate(row):
            if expert >= 0:
                neurons[token, slot] = experts.hidden(hidden[token : token + 1], expert)[0]
                outputs[token, slot] = experts.output(neurons[token, slot].unsqueeze(0), expert)[0]
    return neurons, outputs


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("family", STACKED)
@torch.no_grad()
def test_equals_the_loop_and_one_token_at_a_time(family: str) -> None:
    experts = experts_of(family)
    assert can_be_grouped(random_hidden(experts, 3), *experts.stacks)
    for ids in (ROUTES, ROUTES[:1, :1], torch.full((2, 2), -1)):
        hidden = random_hidden(experts, len(ids))
        grouped, loop = (at_slots(experts, hidden, ids, way) for way in (True, False))
        for found, other, expected in zip(grouped, loop, one_at_a_time(experts, hidden, ids)):
            assert found.shape == expected.shape
            assert torch.equal(found[ids < 0], torch.zeros_like(found[ids < 0]))
            if bool((ids >= 0).any()):
                assert relative(found, expected) <= 1e-6
                assert relative(found, other) <= 1e-6


def gradients(experts: Any, hidden: Tensor, grouped: bool) -> list[Tensor]:
    """Of a function that reads neurons and outputs; of the hidden states, the neurons, and every weight."""
    weights = list(experts.stacks)
    if isinstance(experts, StackedExperts):  # biases and norms as well
        names = ("gate_up_proj", "up_proj", "down_proj", "post_expert_norm")
        weights = [p for name, p in experts.module.named_parameters() if name.startswith(names) and p.requires_grad]
    leaf = hidden.clone().requires_grad_()
    neurons, outputs = at_slots(experts, leaf, ROUTES, grouped)
    draw = torch.Generator().manual_seed(1)
    value = sum((part * torch.randn(part.shape, generator=draw).to(part)).sum() for part in (neurons, outputs))
    return list(torch.autograd.grad(value, [leaf, neurons, *weights]))


@pytest.mark.parametrize("family", STACKED)
def test_gradients_equal_the_loops(family: str) -> None:
    experts = experts_of(family)
    hidden = random_hidden(experts, len(ROUTES))
    found, expected = (gradients(experts, hidden, way) for way in (True, False))
    assert len(found) >= 4
    for ours, theirs in zip(found, expected):
        assert relative(ours, theirs) <= 1e-6
    without_slots = found[0][2]
    assert torch.equal(without_slots, torch.zeros_like(without_slots))


class _Full(torch.autograd.Function):
    """A grouped product that leaves NaN in the rows of no expert, forward and backward, as uninitialised memory may."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, ends)
        return _products(rows, weights, ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        rows, weights, ends = ctx.saved_tensors
        starts = [0, *ends.tolist()]
        own = [rows[a:b].t() @ grad[a:b] for a, b in pairwise(starts)]
        return _products(grad, weights.transpose(1, 2), ends), torch.stack(own), None


def _products(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    out, start = rows.new_full((len(rows), weights.shape[2]), float("nan")), 0
    for expert, end in enumerate(ends.tolist()):
        out[start:end] = rows[start:end] @ weights[expert]
        start = end
    return out


@pytest.fixture
def nan_in_free_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_products, "_PRODUCT", lambda rows, weights, offs: _Full.apply(rows, weights, offs))


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "llama4", "jetmoe", "nemotron_h"])
def test_what_is_in_memory_reaches_nothing(family: str, nan_in_free_rows: None) -> None:
    experts = experts_of(family)
    hidden = random_hidden(experts, len(ROUTES))
    with torch.no_grad():
        for part in at_slots(experts, hidden, ROUTES, True):
            assert torch.isfinite(part).all()
    for ours, theirs in zip(gradients(experts, hidden, True), gradients(experts, hidden, False)):
        assert relative(ours, theirs) <= 1e-6


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "llama4", "jetmoe", "nemotron_h", "deepseek_v4"])
def test_finite_differences_in_float64(family: str, nan_in_free_rows: None) -> None:
    """torch has no grouped product in float64: everything around it is checked with a product written out here."""
    experts = experts_of(family, torch.float64)
    hidden = random_hidden(experts, len(ROUTES)).requires_grad_()
    function: Callable[[Tensor], Any] = lambda rows: at_slots(experts, rows, ROUTES, True)  # noqa: E731
    assert torch.autograd.gradcheck(function, (hidden,), fast_mode=True)
    with torch.no_grad():
        for found, expected in zip(function(hidden), one_at_a_time(experts, hidden, ROUTES)):
            assert relative(found, expected) <= 1e-12


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "llama4"])
def test_float64_takes_the_loop(family: str) -> None:
    experts = experts_of(family, torch.float64)
    hidden = random_hidden(experts, len(ROUTES))
    assert not has_grouped_product(hidden)
    assert not takes_grouped_products(experts, hidden, len(hidden))
    with torch.no_grad():
        found = at_slots(experts, hidden, ROUTES, False)
        for ours, expected in zip(found, one_at_a_time(experts, hidden, ROUTES)):
            assert relative(ours, expected) <= 1e-12
    leaf = hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: at_slots(experts, rows, ROUTES, False), (leaf,), fast_mode=True)


def test_second_derivatives() -> None:
    experts = experts_of("olmoe")
    hidden = random_hidden(experts, len(ROUTES))

    def second(grouped: bool) -> Tensor:
        leaf = hidden.clone().requires_grad_()
        first = torch.autograd.grad(at_slots(experts, leaf, ROUTES, grouped)[1].sum(), leaf, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    assert relative(second(True), second(False)) <= 1e-5


class _Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "equal", "bincount", "unique", "masked_select", "is_nonzero")
        if any(name in str(func) for name in waits):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def waits_of_the_host() -> Iterator[list[str]]:
    counter = _Waits()
    with pytest.MonkeyPatch.context() as patch, counter:
        for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy"):
            native = getattr(Tensor, name)

            def seen(self: Tensor, *args: Any, _name: str = name, _native: Any = native) -> Any:
                counter.found.append(_name)
                return _native(self, *args)

            patch.setattr(Tensor, name, seen)
        yield counter.found


@pytest.mark.parametrize("family", STACKED)
def test_the_host_never_waits(family: str) -> None:
    experts = experts_of(family)
    hidden = random_hidden(experts, len(ROUTES)).requires_grad_()
    with waits_of_the_host() as found:
        order, groups = sort_by_expert(ROUTES.flatten(), N_EXPERTS)
        for with_gradient in (False, True):
            with torch.set_grad_enabled(with_gradient):
                assert takes_grouped_products(experts, hidden, len(hidden))
                neurons = hidden_of_rows(experts, hidden[order // ROUTES.shape[1]], groups, True)
                outputs = output_of_rows(experts, neurons, groups, hidden.shape[1], True)
        outputs.sum().backward()
    assert found == []
    with waits_of_the_host() as found:
        hidden_of_rows(experts, hidden[order // ROUTES.shape[1]], groups, False)
    assert found != []


def test_parts_of_the_rows_are_the_whole() -> None:
    ids = torch.tensor([0, 0, 0, 2, 2, 5, -1, -1])
    _, whole = sort_by_expert(ids, N_EXPERTS)
    assert whole.ends.tolist() == [3, 3, 5, 5, 5, 6, 6, 6]
    assert whole.ends.dtype == torch.int32
    experts = experts_of("gpt_oss")
    rows = random_hidden(experts, len(ids))
    with torch.no_grad():
        expected = hidden_of_rows(experts, rows, whole, True)
        for n_rows in (1, 2, 3, 8, 100):
            found = [hidden_of_rows(experts, rows[some], part, True) for some, part in whole.parts(n_rows)]
            assert relative(torch.cat(found), expected) <= 1e-6
            each = [(some, own, expert) for some, part in whole.parts(n_rows) for own, expert in part.each()]
            again = torch.cat([ids[some][own] for some, own, _ in each])
            assert torch.equal(again, ids[:6])
            assert all((ids[some][own] == expert).all() for some, own, expert in each)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "llama4", "jetmoe"])
@torch.no_grad()
def test_half_precision_is_as_close_as_the_loop(family: str, dtype: torch.dtype) -> None:
    experts, exact = experts_of(family, dtype), experts_of(family, torch.float64)
    for stack, half in zip(exact.stacks, experts.stacks):
        stack.copy_(half)
    hidden = random_hidden(experts, len(ROUTES))
    grouped, loop = (at_slots(experts, hidden, ROUTES, way)[1].double() for way in (True, False))
    expected = at_slots(exact, hidden.double(), ROUTES, False)[1]
    assert relative(grouped, expected) <= 2 * relative(loop, expected) + torch.finfo(dtype).eps


class _Normed(nn.Module):
    """Experts as transformers decorates them, without a gate, with biases, and a norm that gives something for zero."""

    has_gate, has_bias, is_transposed, has_post_expert_norm = False, True, False, True

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.up_proj = nn.Parameter(torch.randn(N_EXPERTS, 24, 32, generator=draw))
        self.up_proj_bias = nn.Parameter(torch.randn(N_EXPERTS, 24, generator=draw))
        self.down_proj = nn.Parameter(torch.randn(N_EXPERTS, 32, 24, generator=draw))
        self.down_proj_bias = nn.Parameter(torch.randn(N_EXPERTS, 32, generator=draw))
        self.act_fn = nn.Sigmoid()
        self.post_expert_norm = nn.LayerNorm(32)
        nn.init.normal_(self.post_expert_norm.bias, generator=draw)


@pytest.mark.parametrize("fills", [False, True])
def test_biases_and_a_norm_after_each_expert(fills: bool, request: pytest.FixtureRequest) -> None:
    if fills:
        request.getfixturevalue("nan_in_free_rows")
    experts = StackedExperts(_Normed())
    hidden = random_hidden(experts, len(ROUTES))
    with torch.no_grad():
        grouped, expected = at_slots(experts, hidden, ROUTES, True), one_at_a_time(experts, hidden, ROUTES)
        for found, exact in zip(grouped, expected):
            assert torch.equal(found[ROUTES < 0], torch.zeros_like(found[ROUTES < 0]))
            assert relative(found, exact) <= 1e-6
    ours, theirs = (gradients(experts, hidden, way) for way in (True, False))
    assert len(ours) == 2 + 6
    for found, exact in zip(ours, theirs):
        assert relative(found, exact) <= 1e-6


# -- when the loop is taken ------------------------------------------------------------------------------------------


def test_the_loop_where_the_calls_are_watched() -> None:
    experts: Any = experts_of("olmoe")
    hidden = random_hidden(experts, 3)
    assert takes_grouped_products(experts, hidden, len(hidden))
    seen: list[int] = []
    handle = experts.module.act_fn.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    assert not takes_grouped_products(experts, hidden, len(hidden))
    order, groups = sort_by_expert(torch.tensor([1, 1, 4]), N_EXPERTS)
    hidden_of_rows(experts, hidden[order], groups)
    assert seen == [2, 1]
    handle.remove()


def test_the_loop_where_torch_has_no_equal_product() -> None:
    stack = torch.randn(4, 16, 32)
    rows = torch.randn(3, 32)
    assert can_be_grouped(rows, stack)
    assert not can_be_grouped(rows[:0], stack)
    assert not can_be_grouped(rows)
    assert not can_be_grouped(rows.double(), stack)  # two number formats
    assert not can_be_grouped(rows[:, :30], stack[:, :, :30].contiguous())  # strides that no kernel reads
    assert not can_be_grouped(rows, torch.randn(4 * 16 * 32 + 1)[1:].view(4, 16, 32))  # nor addresses
    assert not can_be_grouped(rows, stack.transpose(1, 2).contiguous().transpose(1, 2))
    assert not can_be_grouped(rows, stack.to("meta"))
    assert not can_be_grouped(torch.randn(3, 4), torch.randn(1100, 4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_be_grouped(rows, stack)
    assert not can_be_grouped(rows, stack.as_subclass(_Subclass))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, on first use
def test_the_loop_for_forward_mode_derivatives() -> None:
    experts = experts_of("olmoe")
    hidden, direction = random_hidden(experts, len(ROUTES)), random_hidden(experts, len(ROUTES), seed=1)
    order, groups = sort_by_expert(ROUTES.flatten(), N_EXPERTS)

    def neurons(hidden: Tensor) -> Tensor:
        return hidden_of_rows(experts, hidden[order // ROUTES.shape[1]], groups)

    _, found = torch.func.jvp(neurons, (hidden,), (direction,))
    step = 1e-3
    expected = (neurons(hidden + step * direction) - neurons(hidden - step * direction)) / (2 * step)
    assert relative(found, expected) <= 1e-3


class _Subclass(Tensor):
    """A weight with products of its own."""


def test_a_processor_loops_over_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_experts, "LOOP_FROM_ROWS", 4)
    experts = experts_of("olmoe")
    few, many = random_hidden(experts, 4 * N_EXPERTS - 1), random_hidden(experts, 4 * N_EXPERTS)
    with torch.no_grad():
        assert takes_grouped_products(experts, few, len(few))
        assert not takes_grouped_products(experts, many, len(many))
    assert takes_grouped_products(experts, many, len(many))  # gradients of a loop hold a stack of zeros for each expert


def test_whether_there_is_a_product_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def refuses(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        raise RuntimeError("not on this device")

    monkeypatch.setattr(grouped_products, "_TRIED", {})
    monkeypatch.setattr(grouped_products, "_PRODUCT", refuses)
    assert not has_grouped_product(torch.zeros(1))
    assert not has_grouped_product(torch.zeros(2))
    assert calls == [1]
    monkeypatch.setattr(grouped_products, "_TRIED", {})
    monkeypatch.setattr(grouped_products, "_PRODUCT", None)
    assert not has_grouped_product(torch.zeros(1))
