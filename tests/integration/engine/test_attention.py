"""Fused attention: the same numbers, only where nobody looks inside, and everything as before afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moe_interp as mi
from moe_interp.arch.modules import unwrap
from moe_interp.engine.attention import can_fuse, fused_attention
from moe_interp.experiments.inputs.items import ItemBatch, check_items, tokenize_items
from moe_interp.experiments.isolation.scoring import PrefixScorer
from tests import tiny

TOKENS = tiny.random_tokens(2, 12)


def attached(name: str, dtype: torch.dtype = torch.float32) -> mi.MoEHooks:
    bridge = tiny.build_bridge(tiny.build_hf(name, dtype=dtype), name)
    tiny.set_experts_implementation(bridge, "eager")
    return mi.attach(bridge)


def logits(moe: mi.MoEHooks) -> torch.Tensor:
    with torch.no_grad():
        return moe.bridge.original_model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe", "phimoe", "mixtral", "qwen2_moe"])
def test_fused_attention_agrees_and_is_taken_back(name: str) -> None:
    moe = attached(name)
    before = logits(moe)
    assert can_fuse(moe)
    with fused_attention(moe):
        fused = logits(moe)
    torch.testing.assert_close(fused, before, atol=1e-5, rtol=0)
    with pytest.raises(KeyboardInterrupt), fused_attention(moe):
        raise KeyboardInterrupt
    assert torch.equal(logits(moe), before)


def test_a_model_without_fused_attention_or_with_a_hook_inside_keeps_its_own() -> None:
    assert not can_fuse(attached("gpt_oss"))  # its sinks are not in the fused product
    moe = attached("olmoe")
    with moe.bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda value, hook: value)]):
        assert not can_fuse(moe)
    assert can_fuse(moe)
    assert not can_fuse(attached("olmoe", torch.bfloat16))


def scorer_of(moe: mi.MoEHooks) -> tuple[PrefixScorer, ItemBatch]:
    raw = [
        {"id": str(i), "domain": "d", "prompt": row[:-2], "answer": row[-2:]} for i, row in enumerate(TOKENS.tolist())
    ]
    items = tokenize_items(moe.bridge, check_items(raw))
    return PrefixScorer(moe, "force", 256), ItemBatch.build([0, 1], items, "cpu")


@torch.no_grad()
def test_a_fused_path_that_leaves_something_out_is_noticed_and_not_used() -> None:
    moe = attached("olmoe")
    scorer, batch = scorer_of(moe)
    natural = scorer.begin(batch, list(moe.layers), [])  # type: ignore[arg-type]
    assert scorer.runner.fuses_attention
    assert (scorer.null_difference or 0.0) <= 1e-5
    attention: Any = unwrap(moe.bridge.blocks[-1].attn)
    native = attention.forward

    def without_a_cap(*args: Any, **kwargs: Any) -> Any:
        out, *rest = native(*args, **kwargs)
        return (out * 1.05, *rest)

    attention.forward = without_a_cap
    scorer, batch = scorer_of(moe)
    torch.testing.assert_close(scorer.begin(batch, list(moe.layers), []), natural)  # type: ignore[arg-type]
    assert (scorer.runner.fuses_attention, scorer.resumes) == (False, True)
    assert (scorer.null_difference or 0.0) <= 1e-5


def test_an_image_encoder_keeps_its_own_kind_of_attention() -> None:
    moe = attached("qwen3_vl_moe")
    config: Any = moe.bridge.original_model.config
    config.vision_config._attn_implementation = "sdpa"
    with fused_attention(moe):
        assert config.text_config._attn_implementation == "sdpa"
    kinds = (config._attn_implementation, config.text_config._attn_implementation)
    assert (*kinds, config.vision_config._attn_implementation) == ("eager", "eager", "sdpa")
