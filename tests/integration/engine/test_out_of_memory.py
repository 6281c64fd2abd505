"""Memory that runs out in a pass: fewer are taken at a time, with the same results, and the model is as it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moe_interp as mi
from moe_interp.arch.modules import unwrap
from moe_interp.engine.memory import HalvedBatchWarning, Memory, is_out_of_memory
from moe_interp.errors import DataError
from moe_interp.routes import score_routes
from tests import tiny

QUIET: dict[str, Any] = {"progress": False}


def attached(family: str = "olmoe") -> mi.MoEHooks:
    return mi.attach(tiny.build_bridge(tiny.build_hf(family), family))


@contextmanager
def room_for(moe: mi.MoEHooks, rows: int, per_row: int | None = None) -> Iterator[list[tuple[int, ...]]]:
    """The last layer runs out of memory above so many rows (or tokens); gives the shapes that it was asked for."""
    asked: list[tuple[int, ...]] = []

    def refuse(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        asked.append(tuple(hidden.shape))
        if hidden.shape[0] > rows or (per_row is not None and hidden.shape[0] * hidden.shape[1] > per_row):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    handle = unwrap(moe.bridge.blocks[-1]).register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield asked
    finally:
        handle.remove()


def state_of(moe: mi.MoEHooks) -> tuple[Any, ...]:
    moe.bridge(tiny.random_tokens(1, 4))  # what a first pass leaves in its modules is there before and after
    modules = [*moe.bridge.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
    forwards = [m.__dict__.get("forward") for m in modules]
    configs = {id(c): dict(c.__dict__) for m in modules if (c := getattr(m, "config", None)) is not None}
    return hooks, forwards, configs, [m.training for m in modules]


def routes_of(moe: mi.MoEHooks, tokens: Tensor, layer: int = 0, n: int = 12) -> Tensor:
    spec = moe.spec(layer)
    draw = torch.Generator().manual_seed(1)
    return torch.rand(*tokens.shape, n, spec.n_experts, generator=draw).topk(spec.top_k).indices


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_branches_in_halves_score_the_same_and_it_is_said_once_at_the_users_line(family: str) -> None:
    moe, tokens = attached(family), tiny.random_tokens(3, 40)
    layer = moe.layers[0]
    routes, before = routes_of(moe, tokens, layer), state_of(moe)
    whole = score_routes(moe, tokens, layer, routes)
    with room_for(moe, 3) as asked, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        halved = score_routes(moe, tokens, layer, routes)
    assert max(shape[0] for shape in asked) > 3  # it was tried
    torch.testing.assert_close(halved, whole, atol=2e-5, rtol=0, equal_nan=True)
    assert [(w.category, w.filename) for w in said] == [(HalvedBatchWarning, __file__)]
    assert "same results" in str(said[0].message)
    failed = [shape[0] for shape in asked if shape[0] > 3 and shape[1] > 1]
    assert failed == sorted(set(failed), reverse=True)  # what has fitted is kept to
    assert state_of(moe) == before
    assert torch.equal(score_routes(moe, tokens, layer, routes).nan_to_num(), whole.nan_to_num())


def test_parts_of_a_row_are_taken_at_last_and_then_it_is_refused_in_words() -> None:
    moe, tokens = attached(), tiny.random_tokens(2, 20)
    routes, before = routes_of(moe, tokens), state_of(moe)
    whole = score_routes(moe, tokens, 0, routes)
    # the plain pass has 40 tokens, a row of branches 64
    with room_for(moe, 2, per_row=40), pytest.warns(HalvedBatchWarning):
        parts = score_routes(moe, tokens, 0, routes)
    torch.testing.assert_close(parts, whole, atol=2e-5, rtol=0, equal_nan=True)
    with (
        room_for(moe, 1),
        pytest.raises(DataError, match=r"out of memory \(CUDA.*Take shorter"),
    ):
        score_routes(moe, tokens, 0, routes)  # a plain pass is not cut: its sequences are the caller's
    assert state_of(moe) == before


def test_memory_that_runs_out_in_a_users_hook_leaves_the_model_as_it_was() -> None:
    moe, tokens = attached(), tiny.random_tokens(2, 8)
    before, plain = state_of(moe), moe.bridge(tokens)

    def fail(value: Tensor, hook: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for point in ("router_logits", "expert_indices", "expert_out", "routed_out"):
        with pytest.raises(torch.OutOfMemoryError):
            moe.bridge.run_with_hooks(tokens, fwd_hooks=[(moe.hook_name(point, moe.layers[-1]), fail)])
        assert state_of(moe) == before
        assert torch.equal(moe.bridge(tokens), plain)


def items() -> list[dict[str, Any]]:
    ids = np.random.default_rng(0).integers(3, 90, (6, 9)).tolist()
    return [{"id": f"i{i}", "domain": "ab"[i % 2], "prompt": row[:6], "answer": row[6:]} for i, row in enumerate(ids)]


@pytest.mark.parametrize("mode", ["force", "ablate"])
@pytest.mark.parametrize("rows", [6, 2])  # fewer sets at a time; also fewer items
def test_isolation_in_halves_scores_the_same(mode: Any, rows: int, tmp_path: Path) -> None:
    moe = attached("deepseek_v3")
    options: dict[str, Any] = {"random_draws": 2, "mode": mode, **QUIET}
    before = state_of(moe)
    whole = mi.isolate_experts(moe, items(), **options)
    with room_for(moe, rows), pytest.warns(HalvedBatchWarning) as said:
        halved = mi.isolate_experts(moe, items(), store=tmp_path, **options)
    for name, values in whole.data.data_vars.items():
        kind = values.values.dtype.kind
        if kind == "f":
            np.testing.assert_allclose(halved.data[name].values, values.values, atol=2e-5, err_msg=str(name))
        else:
            assert (halved.data[name].values == values.values).all(), name
    assert len(said) == 1
    assert said[0].filename == __file__
    assert state_of(moe) == before


@pytest.mark.parametrize("controls", [True, False])
def test_counterfactual_routes_in_halves_score_the_same(controls: bool, tmp_path: Path) -> None:
    moe = attached()
    sequences = tiny.random_tokens(5, 12).tolist()
    sequences[1] = sequences[1][:7]
    options: dict[str, Any] = {"n_routes": 6, "controls": controls, **QUIET}
    whole = mi.counterfactual_routes(moe, sequences, **options)
    with room_for(moe, 2), pytest.warns(HalvedBatchWarning) as said:
        halved = mi.counterfactual_routes(moe, sequences, store=tmp_path, **options)
    assert [w.filename for w in said] == [__file__]
    for name, values in whole.data.data_vars.items():
        if values.values.dtype.kind == "f":
            np.testing.assert_allclose(halved.data[name].values, values.values, atol=2e-5, err_msg=str(name))
        else:
            assert (halved.data[name].values == values.values).all(), name


@pytest.mark.parametrize("experiment", ["isolation", "counterfactual"])
def test_what_does_not_fit_alone_is_refused_in_words(experiment: str) -> None:
    moe = attached()
    before = state_of(moe)
    if experiment == "isolation":
        run = partial(mi.isolate_experts, moe, items(), random_draws=2, **QUIET)
    else:
        run = partial(mi.counterfactual_routes, moe, tiny.random_tokens(2, 8).tolist(), n_routes=2, **QUIET)
    with room_for(moe, 0), pytest.raises(DataError, match="out of memory"):
        run()
    assert state_of(moe) == before


def test_errors_that_say_otherwise_are_no_lack_of_memory() -> None:
    memory = Memory(attached())

    def fail(part: slice) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        memory.in_parts(fail, 8, "things")
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    seen: list[tuple[int, int]] = []

    def some(part: slice) -> int:
        seen.append((part.start, part.stop))
        if part.stop - part.start > 3:
            raise torch.OutOfMemoryError("no")
        return part.stop - part.start

    assert sum(memory.in_parts(some, 11, "others")) == 11
    assert seen == [(0, 11), (0, 6), (0, 3), (3, 6), (6, 9), (9, 11)]
    seen.clear()
    assert memory.in_parts(some, 7, "others") == [3, 3, 1]  # later calls begin with what has fitted
