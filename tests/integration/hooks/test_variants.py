"""Options of the families that the tiny configurations leave out: other hooks, other sizes, other parts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests import tiny
from tests.integration.hooks.support import TOLERANCE, Opened, assert_moved, assert_near, biggest_difference
from tests.integration.hooks.test_order import weighted_sum
from tests.integration.hooks.test_sums import native_outputs

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "no latent width": ("nemotron_h", {"moe_latent_size": None}),
    "biased projection": ("nemotron_h", {"mlp_bias": True}),
    "no shared experts": ("ernie4_5_moe", {"moe_num_shared_experts": 0}),
    "one open group": ("deepseek_v2", {"topk_group": 1}),
    "four slots of one group": ("deepseek_v3", {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 4}),
    "no expert bias": ("lfm2_moe", {"use_expert_bias": False, "norm_topk_prob": False}),
    "one slot": ("olmoe", {"num_experts_per_tok": 1}),
    "all slots": ("qwen3_moe", {"num_experts_per_tok": 8, "norm_topk_prob": False}),
    "three slots": ("jetmoe", {"num_experts_per_tok": 3}),
    "one dense slot": ("llama4", {"num_experts_per_tok": 1}),
    "no soft-cap": ("laguna", {"moe_router_logit_softcapping": 0.0, "moe_routed_scaling_factor": 1.0}),
    "twelve experts": ("gpt_oss", {"num_local_experts": 12, "num_experts_per_tok": 5}),
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Opened:
    base, changes = VARIANTS[request.param]
    entry = copy.deepcopy(tiny.CONFIGS[base])
    entry["config"].update(changes)
    monkeypatch.setitem(tiny.CONFIGS, f"{base} {request.param}", entry)
    return Opened(f"{base} {request.param}", torch.float32)


def test_variants_keep_the_contract(variant: Opened) -> None:
    unhooked = variant.run()
    assert torch.equal(unhooked, variant.plain_logits())
    logits, seen = variant.see()
    assert_near(logits, unhooked)
    assert ("shared_out" in variant.moe.hooks(variant.last)) == any(
        "shared" in name for name, _ in variant.native[variant.last].block.named_parameters()
    )
    for label, block_out in native_outputs(variant, lambda layer: layer.block).items():
        slots = variant.moe.spec(label).top_k
        assert seen["expert_indices", label].shape[-1] == slots
        projection = getattr(variant.native[label].block, "fc2_latent_proj", None)
        bias = 0.0 if getattr(projection, "bias", None) is None else projection.bias.detach()
        assert_near(weighted_sum(variant, seen, label) + bias, seen["routed_out", label], where="slots")
        total = seen["routed_out", label]
        total = total + seen["shared_out", label] if ("shared_out", label) in seen else total
        total = total + variant.native[label].block.bias if "jetmoe" in variant.name else total
        assert_near(total.detach(), block_out, where="parts")


def test_variants_replay_and_move(variant: Opened) -> None:
    """Writing back what was read changes nothing; other logits and other experts do."""
    unhooked = variant.run()
    before = ("router_in", "router_logits", "router_probs", "expert_indices", "expert_weights")
    # reading what comes after selection recomputes it, and so rounds what later layers read
    seen = variant.see()[1] | variant.see(only=before)[1]
    for hook in variant.moe.hooks(variant.last):
        read = seen[hook, variant.last]
        difference = biggest_difference(variant.run([(hook, variant.last, lambda _, read=read: read)]), unhooked)
        assert difference <= (0.0 if hook in before else TOLERANCE), hook
    assert_moved(variant.run([("router_logits", variant.last, lambda z: -z)]), unhooked)
    nobody = torch.full((*seen["expert_indices", variant.last].shape[:2], 1), -1)
    emptied = variant.run([("expert_indices", variant.last, lambda _: nobody)])
    module: Any = variant.native[variant.last].experts
    handle = module.register_forward_hook(lambda m, a, out: torch.zeros_like(out))
    try:
        assert_near(emptied, variant.native_logits())
    finally:
        handle.remove()
