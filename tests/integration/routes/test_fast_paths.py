"""What makes branches fast on real sizes, forced on every tiny family: passes side by side, wide products, loops."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import moe_interp as mi
from moe_interp.arch.modules import unwrap
from moe_interp.engine import policy
from moe_interp.engine.branches import can_share_keys
from moe_interp.engine.cpu import matmul
from moe_interp.engine.parallel_passes import n_workers, side_by_side
from moe_interp.engine.recorded_pass import record_pass
from moe_interp.hooks.attach import attach
from moe_interp.routes import branch_scores, plan, score_joint_routes, score_routes
from tests import tiny
from tests.integration.routes.helpers import (
    DECODERS,
    attached,
    largest_difference,
    padded_batch,
    random_routes,
    served_layers,
)


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def default_threads() -> int:
    """How many computing threads a new thread of Python gets."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> list[str]:
    """Many small groups, every product wide, every expert looped; gives the threads that ran groups."""
    monkeypatch.setattr(plan, "ROW_LENGTH", 4)
    monkeypatch.setattr(policy, "AT_ONCE", {"cpu": policy.AtOnce(4, 1, 1)})
    monkeypatch.setattr(matmul, "ONEDNN_IS_FASTER", matmul.HAS_ONEDNN)
    monkeypatch.setattr(matmul, "_FROM_WORK", 0)
    monkeypatch.setattr(matmul, "_FEW_ROWS", 0)
    monkeypatch.setattr(policy, "LOOP_FROM_ROWS", 0)
    monkeypatch.setattr(policy, "LOOP_FROM_WORK", 0)
    return []


def watch(monkeypatch: pytest.MonkeyPatch, moe: Any, seen: list[str]) -> None:
    """Names of the threads that the model runs in."""
    model: nn.Module = moe.bridge.original_model
    native = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(threading.current_thread().name)
        return native(*args, **kwargs)

    monkeypatch.setitem(model.__dict__, "forward", forward)


@pytest.mark.parametrize("name", DECODERS)
def test_side_by_side_gives_the_bits_of_one_after_the_other(
    name: str, forced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = attached(name)
    tokens, mask = padded_batch()
    watch(monkeypatch, moe, forced)
    for layer in served_layers(name, moe)[:1]:
        routes = random_routes(moe, layer, tokens)
        together = score_routes(moe, tokens, layer, routes, attention_mask=mask, method="branch")
        assert len({thread for thread in forced if thread.startswith("moe_interp")}) == 2
        assert default_threads() == 2
        with monkeypatch.context() as patch:
            patch.setattr(branch_scores, "n_workers", lambda moe: 1)
            alone = score_routes(moe, tokens, layer, routes, attention_mask=mask, method="branch")
        assert torch.equal(together.nan_to_num(), alone.nan_to_num())


@pytest.mark.parametrize("name", DECODERS)
def test_float32_with_wide_products_and_loops(name: str, forced: list[str]) -> None:
    moe = attached(name)
    tokens, mask = padded_batch()
    with tiny.experts_run_by("grouped_mm", moe.bridge):
        for layer in served_layers(name, moe):
            routes = random_routes(moe, layer, tokens)
            options: dict[str, Any] = {"positions": [4, -2], "attention_mask": mask}
            found = score_joint_routes(moe, tokens, {layer: routes}, method="branch", **options)
            naive = score_routes(moe, tokens, layer, routes, method="naive", **options)
            assert largest_difference(found.logp, naive) <= 2e-5
            assert found.null_distance <= 2e-5


def test_joint_routes_run_alone(forced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their hooks keep what runs in the model."""
    moe, (tokens, mask) = attached("olmoe"), padded_batch()
    routes = {layer: random_routes(moe, layer, tokens) for layer in (0, 1)}
    watch(monkeypatch, moe, forced)
    score_joint_routes(moe, tokens, routes, attention_mask=mask, method="branch")
    assert set(forced) == {threading.current_thread().name}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_worker_leaves_model_and_threads_as_they_were(
    error: type[BaseException], forced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moe, (tokens, mask) = attached("olmoe"), padded_batch()
    routes = random_routes(moe, 0, tokens)
    whole = score_routes(moe, tokens, 0, routes, attention_mask=mask, method="branch")
    before = {name: set(module.__dict__) for name, module in moe.bridge.original_model.named_modules()}
    head: Any = moe.bridge.original_model.model.layers[-1].mlp
    native, calls = head.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(threading.current_thread().name)
        if len(calls) == 4:  # the plain forward is the first
            raise error
        if len(calls) > 4:
            time.sleep(0.1)  # the caller must get its turn
        return native(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setitem(head.__dict__, "forward", forward)
        with pytest.raises(error):
            score_routes(moe, tokens, 0, routes, attention_mask=mask, method="branch")
    assert len(calls) < 12  # what was begun is finished, and nothing more
    assert default_threads() == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("moe_interp")]
    assert before == {name: set(module.__dict__) for name, module in moe.bridge.original_model.named_modules()}
    again = score_routes(moe, tokens, 0, routes, attention_mask=mask, method="branch")
    assert torch.equal(again.nan_to_num(), whole.nan_to_num())


def test_scores_within_inference_mode(forced: list[str]) -> None:
    moe, (tokens, mask) = attached("olmoe"), padded_batch()
    routes = random_routes(moe, 0, tokens)
    outside = score_routes(moe, tokens, 0, routes, attention_mask=mask, method="branch")
    with torch.inference_mode():
        inside = score_routes(moe, tokens, 0, routes, attention_mask=mask, method="branch")
    assert largest_difference(outside, inside) <= 1e-6


def test_passes_share_a_model_only_where_they_cannot_disturb_each_other(two_threads: None) -> None:
    moe = attached("olmoe")
    assert n_workers(moe) == 2
    with moe.bridge.hooks(fwd_hooks=[("blocks.0.hook_out", lambda value, hook: None)]):
        assert n_workers(moe) == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert n_workers(moe) == 1
    with torch.device("cpu"), tiny.float64_casts():  # such a mode belongs to one thread
        assert n_workers(moe) == 1
    with FlopCounterMode(display=False):
        assert n_workers(moe) == 1
    moe.bridge.cfg.use_attn_in = True
    try:
        assert n_workers(moe) == 1
    finally:
        moe.bridge.cfg.use_attn_in = False
    part = moe.bridge.original_model.model.norm
    handle = part.register_forward_hook(lambda module, args, output: None)
    assert n_workers(moe) == 1
    handle.remove()
    part._hf_hook = object()  # what accelerate leaves on a module that it moves in and out
    try:
        assert n_workers(moe) == 1
    finally:
        del part._hf_hook
    for threads, workers in ((1, 1), (3, 3), (8, 4)):
        torch.set_num_threads(threads)
        assert n_workers(moe) == workers


def test_hooks_that_transformers_leaves_on_a_model_do_not_end_passes_side_by_side(two_threads: None) -> None:
    moe = attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe"))
    model: Any = moe.bridge.original_model
    model(tiny.random_tokens(1, 4), output_hidden_states=True, output_router_logits=True)
    layer = unwrap(model.model.layers[1])
    assert layer._forward_hooks
    assert n_workers(moe) == 2
    layer.register_forward_hook(lambda module, args, output: None)
    assert n_workers(moe) == 1


def test_workers_share_cores_and_the_default_stays(two_threads: None, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[int, int]] = []
    torch.set_num_threads(8)
    side_by_side(lambda item: seen.append((torch.get_num_threads(), default_threads())), range(6), 3)
    assert seen == [(2, 8)] * 6
    for _ in range(50):  # so short that a worker may come when all is done
        side_by_side(lambda item: None, range(3), 3)
    assert not caplog.records
    assert default_threads() == torch.get_num_threads() == 8


def test_workers_share_the_memory_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, tokens = attached("olmoe"), tiny.random_tokens(1, 40)
    monkeypatch.setattr(policy, "AT_ONCE", {"cpu": policy.AtOnce(10**9, 10**9, 1)})
    monkeypatch.setattr(plan, "_WORKER_BYTES", 1)
    base = record_pass(moe, tokens, [0])
    alone, both = (plan.Plan(base, 0, 40, 2**25, workers, can_share_keys(base)) for workers in (1, 2))
    assert (alone.workers, both.workers) == (1, 2)
    assert alone.rows_at_once // 2 >= both.rows_at_once >= 0.9 * alone.rows_at_once // 2 > 0
    assert alone.logits_at_once // 2 == both.logits_at_once > 0
    groups = list(both.rows(torch.arange(39).repeat(40)))
    assert len(groups) % 2 == 0
    assert all(len(sequence) <= both.rows_at_once for sequence, _ in groups)
    monkeypatch.setattr(plan, "_WORKER_BYTES", 2**30)
    assert plan.Plan(base, 0, 40, 2**25, 2, can_share_keys(base)).workers == 1


def test_offloaded_weights_are_scored_rightly() -> None:
    tokens = tiny.random_tokens(1, 6)
    here = mi.attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe"))
    routes = random_routes(here, 0, tokens)
    naive = score_routes(here, tokens, 0, routes, positions=[3], method="naive")
    cpu_offload(here.bridge.original_model, torch.device("cpu"))
    found = score_routes(here, tokens, 0, routes, positions=[3])
    assert largest_difference(found, naive) <= 2e-5
