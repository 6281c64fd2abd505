"""Lean passes: the model's own modules, the same numbers, hooks still served, and everything as before afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import moe_interp as mi
from moe_interp.arch.modules import unwrap
from moe_interp.engine import policy
from moe_interp.engine.attention import fused_attention, queried_only_at
from moe_interp.engine.cpu.expert_loop import LOOP, looped_experts
from moe_interp.engine.cpu.fast_modules import FastModules
from moe_interp.engine.recorded_pass import RecordedLayer
from moe_interp.engine.replaced_forward import swapped_forward
from moe_interp.experiments.inputs.items import ItemBatch, check_items, tokenize_items
from moe_interp.experiments.isolation.scoring import PrefixScorer
from tests import tiny

FAMILIES = ["olmoe", "qwen3_moe", "deepseek_v3", "glm4_moe", "gemma4_text", "minimax_m2"]


def attached(name: str, implementation: str = "eager", dtype: torch.dtype = torch.float32) -> mi.MoEHooks:
    bridge = tiny.build_bridge(tiny.build_hf(name, dtype=dtype), name)
    tiny.set_experts_implementation(bridge, implementation)
    return mi.attach(bridge)


def logits(moe: mi.MoEHooks, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return moe.bridge.original_model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_norms_are_equal_and_are_taken_back(name: str, dtype: torch.dtype) -> None:
    moe, tokens = attached(name, dtype=dtype), tiny.random_tokens(2, 12)
    before = logits(moe, tokens)
    fast = FastModules(moe)
    with fast.modules():
        found = logits(moe, tokens)
    # float32 norms take fewer steps; products this small stay as they are
    assert float((found - before).abs().max()) <= (1e-5 if dtype == torch.float32 else 0.0)
    with pytest.raises(KeyboardInterrupt), fast.modules():
        raise KeyboardInterrupt
    assert not any("forward" in module.__dict__ for module in [*fast._norms, *fast._linears])


def test_a_hooked_norm_still_fires() -> None:
    moe, tokens, seen = attached("olmoe"), tiny.random_tokens(2, 12), []
    fast = FastModules(moe)
    assert len(fast._norms) >= 2 * moe.bridge.cfg.n_layers
    hooks: Any = [("blocks.1.ln2.hook_scale", lambda value, hook: seen.append(value.shape))]
    with moe.bridge.hooks(fwd_hooks=hooks), fast.modules():
        logits(moe, tokens)
    assert seen == [(2, 12, 1)]


def test_a_norm_that_somebody_watches_is_called() -> None:
    """Neither does the trial of norms call it, nor is it computed around what watches it."""
    moe, tokens, seen = attached("olmoe"), tiny.random_tokens(2, 12), []
    native = unwrap(moe.bridge.blocks[1].ln2)
    before = FastModules(moe)
    with before.modules():
        logits(moe, tokens)
    handle = native.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    for fast in (before, FastModules(moe)):
        assert not seen
        with fast.modules():
            logits(moe, tokens)
        assert seen == [(2, 12, 32)]
        seen.clear()
    handle.remove()


def test_an_activation_that_somebody_keeps_stays_as_it_was() -> None:
    moe, kept = attached("olmoe"), []
    experts: Any = moe.spec(0).experts
    handle = experts.act_fn.register_forward_hook(lambda module, args, output: kept.append((output, output.clone())))
    with torch.no_grad():
        moe.spec(0).expert_functions.hidden(torch.randn(5, 32), 0)
    handle.remove()
    assert len(kept) == 1
    assert torch.equal(*kept[0])


def test_a_linear_map_with_a_forward_of_its_own_keeps_it() -> None:
    moe, tokens, asked = attached("olmoe"), tiny.random_tokens(2, 12), []
    query: Any = unwrap(moe.bridge.blocks[1].attn.q)
    native = query.forward
    with swapped_forward(query, lambda x: asked.append(x.shape) or native(x)), FastModules(moe).modules():
        logits(moe, tokens)
    assert len(asked) == 1


def test_experts_loop_only_where_it_pays_and_nobody_chose_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = attached("olmoe", "grouped_mm")
    spec = moe.spec(moe.layers[0])
    n_tokens = -(-policy.LOOP_FROM_ROWS * spec.n_experts // spec.top_k)
    config, fast = spec.experts.config, FastModules(moe)
    with fast.experts(n_tokens):  # so narrow a model computes too little
        assert config._experts_implementation == "grouped_mm"
    monkeypatch.setattr(policy, "LOOP_FROM_WORK", 0)
    with fast.experts(n_tokens - 1):
        assert config._experts_implementation == "grouped_mm"
    with fast.experts(n_tokens):
        assert config._experts_implementation == LOOP
    with pytest.raises(KeyboardInterrupt), fast.experts(n_tokens):
        raise KeyboardInterrupt
    assert config._experts_implementation == "grouped_mm"
    config._experts_implementation = "batched_mm"
    with fast.experts(n_tokens):
        assert config._experts_implementation == "batched_mm"


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3", "gemma4_text"])
def test_looped_experts_agree_with_grouped_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moe, tokens = attached(name, "grouped_mm"), tiny.random_tokens(4, 150)
    monkeypatch.setattr(policy, "LOOP_FROM_WORK", 0)
    loop, calls = looped_experts, []
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, LOOP, lambda *args: calls.append(len(args)) or loop(*args))
    before = logits(moe, tokens)
    with FastModules(moe).experts(tokens.numel()):
        torch.testing.assert_close(logits(moe, tokens), before, atol=1e-5, rtol=0)
    assert len(calls) == len(moe.layers)


@pytest.mark.parametrize("name", [*FAMILIES, "qwen3_next", "afmoe"])
def test_queries_at_some_positions_give_what_a_whole_pass_gives_there(name: str) -> None:
    moe, tokens = attached(name), tiny.random_tokens(2, 12)
    place = torch.tensor([3, 10, 17, 23])
    with fused_attention(moe):
        before = logits(moe, tokens).flatten(0, 1)
        with queried_only_at(moe.bridge.blocks[-1], place):
            after = logits(moe, tokens).flatten(0, 1)
    torch.testing.assert_close(after[place], before[place], atol=1e-5, rtol=0)
    other = torch.tensor([i for i in range(24) if i not in place.tolist()])
    assert not torch.allclose(after[other], before[other], atol=1e-3)  # it does leave the others out


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which fast parts are entered, in order."""
    found: list[str] = []

    def watch(name: str) -> None:
        native = getattr(FastModules, name)
        monkeypatch.setattr(FastModules, name, lambda self, *args: found.append(name) or native(self, *args))

    watch("modules")
    watch("experts")
    return found


def test_a_resumed_pass_is_lean_and_asks_for_the_reads_only(
    monkeypatch: pytest.MonkeyPatch, entered: list[str]
) -> None:
    moe, asked = attached("olmoe"), []
    rows = tiny.random_tokens(2, 12).tolist()
    raw = [{"id": str(i), "domain": "d", "prompt": row[:-2], "answer": row[-2:]} for i, row in enumerate(rows)]
    scorer = PrefixScorer(moe, "force", 256)
    with torch.no_grad():
        scorer.begin(ItemBatch.build([0, 1], tokenize_items(moe.bridge, check_items(raw)), "cpu"), [0], [])
        query: Any = unwrap(moe.bridge.blocks[-1].attn.q)
        native_query = query.forward
        monkeypatch.setattr(query, "forward", lambda x: asked.append(x.shape[:-1].numel()) or native_query(x))
        entered.clear()
        scorer.sets(0, [(0,), (1,), (2,)], "one", torch.ones(1))  # type: ignore[list-item]
    assert asked == [3 * 2 * 2]  # sets x items x answer tokens, instead of 72
    assert entered == ["modules", "experts"]


def test_branches_are_lean(entered: list[str]) -> None:
    moe = attached("olmoe")
    tokens = tiny.random_tokens(1, 6)
    routes = torch.tensor([0, 1]).expand(1, 6, 1, 2)
    mi.score_routes(moe, tokens, layer=moe.layers[0], routes=routes, method="branch")
    assert entered == ["modules", "experts"]


def test_low_precision_keeps_its_own_sum_over_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = tiny.build_bridge(tiny.build_hf("olmoe", dtype=torch.bfloat16), "olmoe")
    tiny.set_experts_implementation(bridge, "grouped_mm")
    moe = mi.attach(bridge)
    monkeypatch.setattr(policy, "LOOP_FROM_WORK", 0)
    with FastModules(moe).experts(1600):
        assert moe.spec(0).experts.config._experts_implementation == "grouped_mm"


def test_a_prefix_keeps_what_has_positions_and_stacks_it() -> None:
    prefix = RecordedLayer(torch.zeros(2, 3, 4), {})
    by_row, flat, pattern = torch.arange(12.0).view(2, 3, 2), torch.arange(6), torch.zeros(2, 5, 3, 3)
    prefix.keep("attn", (by_row, pattern, "kind"))
    prefix.keep("attn", flat)
    first, second = prefix.answers["attn"]
    assert first[0] is by_row
    assert first[1:] == (None, "kind")
    assert second is flat
    stacked = prefix.stacked(first, 3)
    assert torch.equal(stacked[0], torch.cat([by_row] * 3))
    assert stacked[1:] == (None, "kind")
