"""Branches as a grid: the scores of compact rows and of full passes, on every family that it serves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from moe_interp.arch.modules import unwrap
from moe_interp.engine import branch_attention, policy
from moe_interp.engine.branch_attention import NAME
from moe_interp.engine.branches import BranchRunner
from moe_interp.engine.cuda import compiled
from moe_interp.engine.cuda.compiled import NotCompiledWarning
from moe_interp.engine.grid.attention import GridKeys
from moe_interp.engine.grid.rows import GridRows
from moe_interp.engine.grid.trial import can_run_grid
from moe_interp.engine.memory import HalvedBatchWarning
from moe_interp.engine.policy import GridShares, Policy
from moe_interp.engine.recorded_pass import record_pass
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.routes import check_routes, grid_scores, score_from_base, score_joint_routes, score_routes
from tests import tiny
from tests.integration.routes.helpers import (
    DECODERS,
    attached,
    largest_difference,
    padded_batch,
    precision,
    random_routes,
    served_layers,
    with_windows,
)
from tests.waits import counted_waits

WITHOUT_GRID = {"jetmoe", "nemotron_h"}  # keys repeated behind the cache; attention that is a mixer among others
SERVED = [name for name in DECODERS if served_layers(name, attached(name))]
POSITIONS = [4, -2]


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[GridRows]]:
    """A processor runs grids; gives the rows of those that score routes."""
    ran: list[GridRows] = []
    through = BranchRunner.through

    def watched(self: BranchRunner, rows: Any, hooks: Any = None) -> Tensor:
        if isinstance(rows, GridRows) and self.base.runs_grid is not None:
            ran.append(rows)
        return through(self, rows, hooks)

    monkeypatch.setattr(BranchRunner, "through", watched)
    monkeypatch.setitem(policy.GRID_SHARES, "cpu", GridShares(0.0, 0.0))
    return ran


def scored(moe: MoEHooks, routes: dict[int, Tensor], **options: Any) -> Any:
    tokens, mask = padded_batch()
    return score_joint_routes(moe, tokens, routes, **{"attention_mask": mask, "method": "branch", **options})


def in_compact_rows(moe: MoEHooks, routes: dict[int, Tensor], **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "GRID_SHARES", {})
        return scored(moe, routes, **options)


@pytest.mark.parametrize("name", SERVED)
def test_both_ways_agree(name: str, grid: list[GridRows]) -> None:
    moe = attached(name, torch.float64)
    layer = served_layers(name, moe)[0]
    routes = {layer: random_routes(moe, layer, padded_batch()[0])}
    with precision(torch.float64):
        found = scored(moe, routes)
        assert bool(grid) == (name not in WITHOUT_GRID)
        compact = in_compact_rows(moe, routes)
    assert largest_difference(found.logp, compact.logp) <= 1e-10
    assert largest_difference(found.logp_null, compact.logp_null) <= 1e-10
    assert found.null_distance <= 1e-10


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v3", "granite_moe", "mixtral", "gemma4_text"])
def test_full_passes_in_float32(name: str, grid: list[GridRows]) -> None:
    """Padding on both sides, sinks, groups of heads, values narrower than keys, a scale after the unembedding."""
    moe = attached(name)
    for layer in moe.layers:
        assert isinstance(layer, int)
        routes = {layer: random_routes(moe, layer, padded_batch()[0])}
        found = scored(moe, routes, positions=POSITIONS)
        naive = scored(moe, routes, positions=POSITIONS, method="naive")
        assert largest_difference(found.logp, naive.logp) <= 2e-5
        assert found.null_distance <= 2e-5
    assert grid


@pytest.mark.parametrize("fault", ["scale", "own", "shape", "first", "attribute"])
def test_an_attention_that_comes_out_otherwise_is_not_used(
    fault: str, grid: list[GridRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if fault == "scale":
            options["scaling"] = 2 * options["scaling"]
        if fault == "own":
            value = value * 0.5
        if fault == "shape":
            key = key[..., :-1]
        if fault == "attribute":  # as an attention that reads a mask which is not there
            return mask.of_no_such_name
        out, pattern = branch_attention.branch_attention(module, query, key, value, mask, **options)
        if fault == "first":
            out[:, 0] *= 1.5
        return out, pattern

    moe, (tokens, mask) = attached("olmoe"), padded_batch()
    routes = {0: random_routes(moe, 0, tokens)}
    expected = in_compact_rows(moe, routes).logp
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, faulty)
    assert not can_run_grid(record_pass(moe, tokens, [0], mask))
    assert largest_difference(scored(moe, routes).logp, expected) <= 2e-5
    assert not grid


def test_every_position_of_one_sequence_without_padding(grid: list[GridRows]) -> None:
    moe, tokens = attached("olmoe"), tiny.random_tokens(1, 10)
    routes = random_routes(moe, 0, tokens, n_routes=3)
    found = score_routes(moe, tokens, 0, routes, method="branch")
    assert grid
    assert largest_difference(found, score_routes(moe, tokens, 0, routes, method="naive")) <= 2e-5


def test_positions_that_are_asked_alone_are_scored(grid: list[GridRows]) -> None:
    moe, (tokens, _) = attached("olmoe", torch.float64), padded_batch()
    routes = random_routes(moe, 0, tokens, n_routes=3)
    routes[:, 5, 1] = -1  # absent
    routes[:, 6, 0, 0] = -1  # an expert fewer
    asked = torch.zeros_like(tokens, dtype=torch.bool)
    asked[0, [0, 5, 6, 10]] = asked[1, [3, 10]] = True  # none of sequence 2
    with precision(torch.float64):
        found = scored(moe, {0: routes}, positions=asked)
        compact = in_compact_rows(moe, {0: routes}, positions=asked)
    assert {part.sequence for rows in grid for part in rows.parts} == {0, 1}
    assert largest_difference(found.logp, compact.logp) <= 1e-10
    assert torch.equal(found.logp.isfinite()[0, 5], torch.tensor([True, False, True]))
    assert torch.equal(~found.logp.isnan().all(dim=-1), asked)


@pytest.mark.parametrize("name", ["olmoe", "gemma4_text"])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_joint_routes_at_several_layers(name: str, is_weighted: bool, grid: list[GridRows]) -> None:
    moe, (tokens, _) = attached(name, torch.float64), padded_batch()
    routes = {layer: random_routes(moe, layer, tokens, seed=layer) for layer in moe.layers}  # type: ignore[arg-type]
    routes[moe.layers[0]][:, 4, 1] = -1  # type: ignore[index]
    weights = {layer: torch.rand(r.shape, dtype=torch.float64) for layer, r in routes.items()} if is_weighted else None
    with precision(torch.float64):
        found = scored(moe, routes, positions=POSITIONS, weights=weights)
        naive = scored(moe, routes, positions=POSITIONS, weights=weights, method="naive")
    assert grid
    assert largest_difference(found.logp, naive.logp) <= 1e-10
    assert bool(found.logp[0, 4, 1].isnan())


@pytest.mark.parametrize(
    ("name", "kind", "attention"),
    [
        ("gpt_oss", "sliding_attention", "eager"),
        ("gemma4_text", "sliding_attention", "sdpa"),
        ("llama4", "chunked_attention", "sdpa"),
    ],
)
def test_windows_of_some_of_the_layers_above(name: str, kind: str, attention: str, grid: list[GridRows]) -> None:
    """A window shorter than the sequence, and chunks of attention: by a window, and by the mask itself."""
    moe = with_windows(name, kind, attention)
    layer = moe.layers[0]
    assert isinstance(layer, int)
    routes = {layer: random_routes(moe, layer, padded_batch()[0])}
    with precision(torch.float64):
        found = scored(moe, routes)
        compact = in_compact_rows(moe, routes)
        naive = scored(moe, routes, positions=[-2], method="naive")
    assert largest_difference(found.logp, compact.logp) <= 1e-10
    at = ~naive.logp.isnan()
    assert float((found.logp - naive.logp)[at].abs().max()) <= 1e-10
    masks = [mask for known in grid[0].base.sequence_masks.values() for mask in known]
    assert any(mask.bias is not None if kind == "chunked_attention" else mask.window == 5 for mask in masks)


@pytest.mark.parametrize("branches", [1, 30, 100, 10**6])
def test_groups_of_any_size_give_the_same(branches: int, grid: list[GridRows], monkeypatch: pytest.MonkeyPatch) -> None:
    """One row, parts of a sequence, and several sequences at a time."""
    moe = attached("gpt_oss", torch.float64)
    routes = {0: random_routes(moe, 0, padded_batch()[0], n_routes=3)}
    with precision(torch.float64):
        whole = scored(moe, routes)
        before = len(grid)
        monkeypatch.setattr(policy, "AT_ONCE", {"cpu": policy.AtOnce(branches, 3 * 2**24, 1)})
        found = scored(moe, routes)
    sizes = {1: [1] * 12, 30: [2] * 6, 100: [8, 4], 10**6: [12]}
    assert [len(rows.block_out) for rows in grid[before:]] == sizes[branches]
    assert largest_difference(found.logp, whole.logp) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_own_noise(dtype: torch.dtype, grid: list[GridRows]) -> None:
    moe = attached("olmoe", dtype)
    routes = {0: random_routes(moe, 0, padded_batch()[0])}
    found = scored(moe, routes)
    assert grid
    assert found.logp.dtype == torch.float32
    naive = scored(moe, routes, method="naive")
    assert float((found.logp - naive.logp).abs().nanmedian()) <= 0.03


def test_a_model_whose_attention_is_off_at_half_precision_is_not_taken(
    grid: list[GridRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        options["scaling"] = 3 * options["scaling"]
        return branch_attention.branch_attention(module, query, key, value, mask, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, faulty)
    tokens, mask = padded_batch()
    for name in ("olmoe", "mixtral"):
        assert not can_run_grid(record_pass(attached(name, torch.bfloat16), tokens, [0], mask))


@pytest.mark.parametrize("name", ["olmoe", "granite_moe"])
def test_averaged_predictions(name: str, grid: list[GridRows]) -> None:
    """Granite's logits are scaled after the unembedding: there, averages are made in compact rows."""
    moe, (tokens, mask) = attached(name, torch.float64), padded_batch()
    averaged = torch.rand(3, 12, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    averaged[0, 3] = False
    with precision(torch.float64):
        base = record_pass(moe, tokens, [0], mask)
        routes = check_routes(base, 0, random_routes(moe, 0, tokens, n_routes=4))
        found = score_from_base(base, {0: routes}, method="branch", averaged=averaged)
        assert bool(grid) == base.ends_in_head
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(policy, "GRID_SHARES", {})
            compact = score_from_base(base, {0: routes}, method="branch", averaged=averaged)
    assert largest_difference(found.logp, compact.logp) <= 1e-10
    assert found.mean_entropy is not None
    assert compact.mean_entropy is not None
    assert largest_difference(found.mean_entropy, compact.mean_entropy) <= 1e-10
    assert bool(found.mean_entropy[0, 3].isnan())


# -- which way runs ------------------------------------------------------------------------------------------------
def test_a_grid_runs_where_most_of_its_places_are_scored(grid: list[GridRows], monkeypatch: pytest.MonkeyPatch) -> None:
    moe, tokens = attached("olmoe"), tiny.random_tokens(1, 10)
    routes = random_routes(moe, 0, tokens, n_routes=3)
    monkeypatch.setitem(policy.GRID_SHARES, "cpu", GridShares(0.5, 0.25))
    for positions, runs in (([0, 2, 4], False), ([0, 1, 2, 3, 4], True)):  # the standard routes count
        before = len(grid)
        score_routes(moe, tokens, 0, routes, positions, method="branch")
        assert (len(grid) > before) == runs
    routes[:, :6, :] = -1  # absent routes count as little as positions that are not asked
    before = len(grid)
    score_routes(moe, tokens, 0, routes, method="branch")
    assert len(grid) == before


def test_the_policy_says_where_a_grid_runs() -> None:
    gpu = Policy(torch.device("cuda"), torch.bfloat16)
    assert gpu.takes_grid(0.5)
    assert not gpu.takes_grid(0.49)
    assert gpu.takes_grid(0.3, compiled=True)
    assert "branches in compact rows, or a grid where 50% of its places are scored;" in str(gpu)
    cpu = Policy(torch.device("cpu"), torch.float32)
    assert not cpu.takes_grid(1.0)
    assert "branches in compact rows;" in str(cpu)


def test_a_grid_that_does_not_fit_is_compact_rows(grid: list[GridRows]) -> None:
    moe, tokens = attached("olmoe"), tiny.random_tokens(1, 60)
    routes = random_routes(moe, 0, tokens, n_routes=40)
    roomy = score_routes(moe, tokens, 0, routes, method="branch")
    assert grid
    before = len(grid)
    tight = score_routes(moe, tokens, 0, routes, method="branch", memory_budget=1_700_000)
    assert len(grid) == before
    assert largest_difference(roomy, tight) <= 1e-5


# -- waits, memory, interruptions, threads ---------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("is_averaged", [False, True])
def test_the_loop_over_groups_waits_for_nothing(
    name: str, is_averaged: bool, grid: list[GridRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group waits as often as the model's own plain pass of as many rows does: its experts on a processor."""
    moe, (tokens, mask) = attached(name), padded_batch()
    layer = moe.layers[0]
    assert isinstance(layer, int)
    base = record_pass(moe, tokens, [layer], mask)
    routes = check_routes(base, layer, random_routes(moe, layer, tokens, n_routes=3))
    averaged = torch.ones(3, 12, 3, dtype=torch.bool) if is_averaged else None
    seen: list[str] = []
    in_loop = grid_scores._GridScorer._rows, grid_scores._GridScorer._unembed

    def counting(method: Any) -> Any:
        def call(self: Any, *args: Any) -> Any:
            with counted_waits() as waits:
                found = method(self, *args)
            seen.extend(waits)
            return found

        return call

    can_run_grid(base)
    monkeypatch.setattr(grid_scores._GridScorer, "_rows", counting(in_loop[0]))
    monkeypatch.setattr(grid_scores._GridScorer, "_unembed", counting(in_loop[1]))
    monkeypatch.setattr(policy, "AT_ONCE", {"cpu": policy.AtOnce(30, 3 * 2**24, 2**18)})
    score_from_base(base, {layer: routes}, method="branch", averaged=averaged)
    assert len(grid) >= 6
    assert not [wait for wait in seen if "moe_interp" in wait]
    with counted_waits() as plain:
        moe.bridge(tokens[:2])
    own = {wait.rpartition(" at ")[2] for wait in plain}
    assert {wait.rpartition(" at ")[2] for wait in seen} <= own


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_the_model_as_it_was(
    error: type[BaseException], grid: list[GridRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    moe, (tokens, mask) = attached("olmoe"), padded_batch()
    base = record_pass(moe, tokens, [0], mask)
    routes = check_routes(base, 0, random_routes(moe, 0, tokens))
    assert can_run_grid(base)
    before = {name: set(module.__dict__) for name, module in moe.bridge.original_model.named_modules()}
    attention: Any = unwrap(moe.bridge.blocks[1].attn)
    config = attention.config

    def fail(*args: Any) -> Tensor:
        assert attention.config._attn_implementation == NAME
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(GridKeys, "attend", fail)
        with pytest.raises(error):
            score_from_base(base, {0: routes}, method="branch")
    assert attention.config is config
    assert before == {name: set(module.__dict__) for name, module in moe.bridge.original_model.named_modules()}


def test_two_threads_on_two_models(grid: list[GridRows]) -> None:
    moes = [attached("olmoe"), attached("gpt_oss")]
    routes = [{0: random_routes(moe, 0, padded_batch()[0])} for moe in moes]
    alone = [scored(moe, given).logp for moe, given in zip(moes, routes)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            together = list(pool.map(lambda each: scored(*each).logp, zip(moes, routes)))
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(alone, together))


def test_memory_that_runs_out_halves_what_is_taken(grid: list[GridRows], monkeypatch: pytest.MonkeyPatch) -> None:
    moe = attached("olmoe")
    routes = {0: random_routes(moe, 0, padded_batch()[0], n_routes=3)}
    expected = scored(moe, routes)
    through = BranchRunner.through

    def short(self: BranchRunner, rows: Any, hooks: Any = None) -> Tensor:
        if len(rows.block_out) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return through(self, rows, hooks)

    monkeypatch.setattr(BranchRunner, "through", short)
    with pytest.warns(HalvedBatchWarning, match="rows of a grid at once do not fit"):
        found = scored(moe, routes)
    assert largest_difference(found.logp, expected.logp) <= 1e-6


# -- compiling -----------------------------------------------------------------------------------------------------
@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A backend that runs graphs as they are; gives those that it got."""
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.utils.counters.clear()  # of all that this process has compiled
    monkeypatch.setattr(compiled, "BACKEND", keep)
    monkeypatch.setattr(compiled, "_made", WeakKeyDictionary())
    yield graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_compiled_layers_give_the_same(name: str, grid: list[GridRows], backend: list[Any]) -> None:
    moe = attached(name)
    routes = {0: random_routes(moe, 0, padded_batch()[0])}
    plain = scored(moe, routes)
    found = scored(moe, routes, compile=True)
    assert largest_difference(found.logp, plain.logp) <= 1e-5
    assert compiled._made[moe].failure is None
    assert not torch._dynamo.utils.counters["graph_break"]
    kept = sum("scaled_dot_product" in str(graph.graph) for graph in backend)
    assert kept == 1  # the two layers above share their code, attention included
    n = len(backend)
    scored(moe, routes, compile=True)
    assert len(backend) == n


def test_where_compiling_fails_branches_run_without(
    grid: list[GridRows], backend: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    moe = attached("olmoe")
    routes = {0: random_routes(moe, 0, padded_batch()[0])}
    plain = scored(moe, routes)
    with pytest.warns(NotCompiledWarning, match=r"without torch\.compile, with the same results: .*no compiler here"):
        found = scored(moe, routes, compile=True)
    assert torch.equal(found.logp.nan_to_num(), plain.logp.nan_to_num())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scored(moe, routes, compile=True)


def test_compiled_layers_that_come_out_otherwise_are_not_used(
    grid: list[GridRows], backend: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = compiled._run
    monkeypatch.setattr(compiled, "_run", lambda *args: 1.01 * run(*args))
    moe = attached("olmoe")
    routes = {0: random_routes(moe, 0, padded_batch()[0])}
    plain = scored(moe, routes)
    with pytest.warns(NotCompiledWarning, match="a compiled layer's output differs by"):
        found = scored(moe, routes, compile=True)
    assert torch.equal(found.logp.nan_to_num(), plain.logp.nan_to_num())


def test_what_is_not_the_layer_s_own_is_not_compiled(grid: list[GridRows], backend: list[Any]) -> None:
    moe = attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe"))
    routes = {layer: random_routes(moe, layer, padded_batch()[0]) for layer in (0, 2)}
    model: Any = moe.bridge.original_model
    model(padded_batch()[0], output_hidden_states=True)
    assert unwrap(model.model.layers[1])._forward_hooks  # transformers' own, which only look
    plain = scored(moe, routes)
    found = scored(moe, routes, compile=True)  # layer 2 has hooks, which put its routes in place
    assert largest_difference(found.logp, plain.logp) <= 1e-5
    assert compiled._made[moe].failure is None
    handle = unwrap(moe.bridge.blocks[1].mlp).register_forward_pre_hook(lambda module, args: None)
    try:
        with pytest.warns(NotCompiledWarning, match="hooks are on a module OlmoeSparseMoeBlock"):
            scored(moe, routes, compile=True)
    finally:
        handle.remove()


def test_compact_rows_are_not_compiled_and_say_so_once() -> None:
    moe = attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe"))
    tokens = tiny.random_tokens(1, 8)
    routes = random_routes(moe, 0, tokens)
    with pytest.warns(NotCompiledWarning, match="on cpu they run in compact rows, which are not compiled"):
        found = score_routes(moe, tokens, 0, routes, compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(score_routes(moe, tokens, 0, routes, compile=True).nan_to_num(), found.nan_to_num())
