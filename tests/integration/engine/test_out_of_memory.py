"""Memory that runs out in a pass: fewer are taken at a time, with the same results, and the model is as it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moe_interp as mi
from moe_interp.arch import grouped_products
from moe_interp.arch.modules import unwrap
from moe_interp.engine.memory import HalvedBatchWarning, Memory, is_out_of_memory
from moe_interp.errors import DataError
from moe_interp.routes import branch_scores, score_joint_routes, score_routes
from tests import tiny

QUIET: dict[str, Any] = {"progress": False}


def attached(family: str = "olmoe") -> mi.MoEHooks:
    return mi.attach(tiny.build_bridge(tiny.build_hf(family), family))


@contextmanager
def room_for(
    moe: mi.MoEHooks,
    rows: int,
    per_row: int | None = None,
    error: Exception | None = None,
    only_with_gradients: bool = False,
) -> Iterator[list[tuple[int, ...]]]:
    """The last layer runs out of memory above so many rows (or tokens); gives the shapes that it was asked for."""
    asked: list[tuple[int, ...]] = []

    def refuse(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        asked.append(tuple(hidden.shape))
        if only_with_gradients and not torch.is_grad_enabled():
            return
        if hidden.shape[0] > rows or (per_row is not None and hidden.shape[0] * hidden.shape[1] > per_row):
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

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
    with room_for(moe, 0), pytest.raises(DataError, match=r"out of memory \(CUDA.*Take shorter"):
        score_routes(moe, tokens, 0, routes)
    assert state_of(moe) == before


def unequal(moe: mi.MoEHooks) -> tuple[Tensor, Tensor]:
    """Five sequences, of which the second is padded on the left, and their mask."""
    tokens = tiny.random_tokens(5, 9)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    return tokens, mask


@pytest.mark.parametrize(
    "method, positions", [("branch", None), ("branch", [2, -3]), ("branch", "first"), ("naive", "first")]
)
def test_sequences_are_scored_in_halves(method: Any, positions: Any) -> None:
    moe = attached("gpt_oss")
    tokens, mask = unequal(moe)
    if positions == "first":  # nothing is left to score in the other halves
        positions = torch.zeros_like(mask, dtype=torch.bool)
        positions[0, 2:4] = True
    routes, before = routes_of(moe, tokens, 0, 3), state_of(moe)
    whole = score_routes(moe, tokens, 0, routes, positions, attention_mask=mask, method=method)
    with room_for(moe, 2), pytest.warns(HalvedBatchWarning, match="3 sequences at once") as said:
        halved = score_routes(moe, tokens, 0, routes, positions, attention_mask=mask, method=method)
    assert [w.filename for w in said] == [__file__]
    torch.testing.assert_close(halved, whole, atol=2e-5, rtol=0, equal_nan=True)
    assert state_of(moe) == before


def test_joint_routes_and_a_sequence_that_is_not_finite_keep_their_names_in_halves() -> None:
    moe, tokens = attached(), tiny.random_tokens(5, 9)
    routes = {layer: routes_of(moe, tokens, layer, 3) for layer in moe.layers[:2]}
    whole = score_joint_routes(moe, tokens, routes)
    with room_for(moe, 1), pytest.warns(HalvedBatchWarning):
        halved = score_joint_routes(moe, tokens, routes)
    for name in ("logp", "logp_standard", "logp_null", "router_logp"):
        torch.testing.assert_close(getattr(halved, name), getattr(whole, name), atol=2e-5, rtol=0, equal_nan=True)
    weights = torch.ones(*routes[0].shape)
    weights[3, 2, 1] = 3e38
    with (
        room_for(moe, 2),
        pytest.warns(HalvedBatchWarning),
        pytest.raises(DataError, match="of sequence 3, position 2 under route 1"),
    ):
        score_routes(moe, tokens, 0, routes[0], weights=weights)


def test_screened_sequences_in_halves_are_the_same() -> None:
    moe = attached("deepseek_v3")
    tokens, mask = unequal(moe)
    layers = moe.layers[-2:]
    routes = {layer: routes_of(moe, tokens, layer, 6) for layer in layers}
    options: dict[str, Any] = {"keep": 2, "audit": 7, "attention_mask": mask}
    whole, before = mi.screen_routes(moe, tokens, layers, routes, **options), state_of(moe)
    with room_for(moe, 2), pytest.warns(HalvedBatchWarning) as said:
        halved = mi.screen_routes(moe, tokens, layers, routes, **options)
    assert [w.filename for w in said] == [__file__]
    for layer in layers:
        for name in ("credit", "logp", "logp_standard", "logp_null"):
            found, expected = getattr(halved[layer], name), getattr(whole[layer], name)
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0, equal_nan=True)
        assert torch.equal(halved[layer].is_kept, whole[layer].is_kept)
        audits = halved[layer].audit, whole[layer].audit
        assert (audits[0].sequence == audits[1].sequence).all()
        np.testing.assert_allclose(audits[0].advantage, audits[1].advantage, atol=2e-5)
        np.testing.assert_allclose(audits[0].advantage_kept, audits[1].advantage_kept, atol=2e-5)
    assert state_of(moe) == before


def test_routers_of_domains_in_halves_score_the_same() -> None:
    moe = attached()
    isolated = mi.isolate_experts(moe, items(), random_draws=2, **QUIET)
    whole, before = mi.score_domain_router(moe, items(), isolated, **QUIET), state_of(moe)
    with room_for(moe, 2), pytest.warns(HalvedBatchWarning) as said:
        halved = mi.score_domain_router(moe, items(), isolated, **QUIET)
    assert [w.filename for w in said] == [__file__]
    np.testing.assert_allclose(halved.data["score"], whole.data["score"], atol=2e-5)
    np.testing.assert_allclose(halved.data["score_first"], whole.data["score_first"], atol=2e-5)
    assert state_of(moe) == before
    with room_for(moe, 0), pytest.raises(DataError, match="out of memory"):
        mi.score_domain_router(moe, items(), isolated, **QUIET)
    assert state_of(moe) == before


def test_one_item_that_fits_alone_is_isolated_although_its_copies_do_not_fit() -> None:
    moe, one = attached(), items()[:1]
    whole = mi.isolate_experts(moe, one, random_draws=2, **QUIET)
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate")):
        with room_for(moe, 1, error=error), pytest.warns(HalvedBatchWarning):
            halved = mi.isolate_experts(moe, one, random_draws=2, **QUIET)
        np.testing.assert_allclose(halved.data["delta"], whole.data["delta"], atol=2e-5)
        assert float(halved.data.attrs["null_difference"]) < 1e-5  # it was resumed in the middle, not run whole


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_experts_outputs_of_branches_in_halves(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moe, tokens = attached(family), tiny.random_tokens(2, 10)
    routes = routes_of(moe, tokens)
    whole, native, asked = score_routes(moe, tokens, 0, routes), branch_scores.block_outputs, []

    def outputs(base: Any, layer: int, given: Any, some: Tensor) -> Tensor:
        asked.append(len(some))
        if len(some) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return native(base, layer, given, some)

    monkeypatch.setattr(branch_scores, "block_outputs", outputs)
    with pytest.warns(HalvedBatchWarning, match="9 tokens with their routes at once") as said:
        halved = score_routes(moe, tokens, 0, routes)
    assert len(said) == 1
    assert asked == [18, 9, 5, 5, 5, 3]
    torch.testing.assert_close(halved, whole, atol=2e-5, rtol=0, equal_nan=True)


def test_verify_says_what_had_no_room() -> None:
    moe = attached()
    before = state_of(moe)
    with room_for(moe, 0), pytest.raises(DataError, match=r"out of memory.*Take shorter"):
        moe.verify()
    assert state_of(moe) == before
    last = moe.layers[-1]
    with room_for(moe, 2, only_with_gradients=True):
        table = moe.verify(tiny.random_tokens(3, 6), [last])
    failed = table[~table["passed"]]
    assert set(failed["check"]) == {"gradients arrive"}
    assert failed["note"].str.contains("out of memory.*Give fewer or shorter tokens").all()
    hooks, forwards, *others = state_of(moe)  # the hook points were taken off and put on again
    assert (hooks, [f is None for f in forwards], *others) == (before[0], [f is None for f in before[1]], *before[2:])


def test_a_grouped_product_that_runs_out_of_memory_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    rows = torch.zeros(4, 16)
    monkeypatch.setattr(grouped_products, "_TRIED", {})
    with monkeypatch.context() as patch:
        patch.setattr(grouped_products, "_PRODUCT", fail)
        with pytest.raises(torch.OutOfMemoryError):
            grouped_products.has_grouped_product(rows)
    assert grouped_products.has_grouped_product(rows)


def test_memory_that_runs_out_in_a_users_hook_leaves_the_model_as_it_was() -> None:
    moe, tokens = attached(), tiny.random_tokens(2, 8)
    before, plain = state_of(moe), moe.bridge(tokens)

    def fail(value: Tensor, hook: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def elsewhere() -> Tensor:
        """A pass with hooks in another thread, which is refused while the model is somebody's."""
        hooks = [(moe.hook_name("router_logits", moe.layers[0]), lambda value, hook: None)]
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(moe.bridge.run_with_hooks, tokens, fwd_hooks=hooks).result()

    for point in ("router_logits", "expert_indices", "expert_out", "routed_out"):
        hooks = [(moe.hook_name(point, moe.layers[-1]), fail)]
        with pytest.raises(torch.OutOfMemoryError):
            moe.bridge.run_with_hooks(tokens, fwd_hooks=hooks)
        with pytest.raises(torch.OutOfMemoryError), moe.bridge.hooks(fwd_hooks=hooks):
            moe.bridge(tokens)
        assert state_of(moe) == before
        assert not any(p.has_hooks() for p in moe.bridge.hook_dict.values())
        assert torch.equal(moe.bridge(tokens), plain)
        assert torch.equal(elsewhere(), plain)


def test_memory_that_runs_out_in_a_hook_that_stays_is_told_in_words_by_an_experiment() -> None:
    """The hook is a part of every pass, and fails in passes of any size."""
    moe = attached()
    before = state_of(moe)

    def fail(value: Tensor, hook: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    name = moe.hook_name("routed_out", moe.layers[-1])
    moe.bridge.add_hook(name, fail)
    for run in (
        lambda: mi.isolate_experts(moe, items(), random_draws=2, **QUIET),
        lambda: score_routes(moe, tiny.random_tokens(3, 6), 0, routes_of(moe, tiny.random_tokens(3, 6), 0, 2)),
    ):
        with pytest.raises(DataError, match="out of memory"):
            run()
        assert [len(p.fwd_hooks) for p in moe.bridge.hook_dict.values() if p.has_hooks()] == [1]
    moe.bridge.reset_hooks(including_permanent=True)
    assert state_of(moe) == before


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
