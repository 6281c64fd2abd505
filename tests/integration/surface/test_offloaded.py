"""Weights that accelerate keeps elsewhere until a module is called: every hook gives what the model in memory gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn

import moe_interp as mi
from moe_interp.arch.families import find_container
from moe_interp.arch.modules import child, unwrap
from moe_interp.arch.offload import device_of
from moe_interp.hooks.attach import MoEHooks, attach
from tests import tiny
from tests.integration.surface.helpers import TOKENS, attach_to, build, cache_of, logits_of, negate, run_hooked

# their own code, or TransformerLens', reads weights of a module outside of its call: they run offloaded in larger parts
ONLY_IN_PARTS = ("gpt_oss", "llama4", "nemotron_h", "jamba", "granite_moe_hybrid", "lfm2_moe", "deepseek_v2", "laguna")
PARTS = ("layer", "block", "experts", "router")


def parts_of(bridge: Any, part: str) -> list[nn.Module]:
    stacks = [s for s in ("blocks", "encoder_blocks", "decoder_blocks") if s in bridge._modules]
    layers = [unwrap(block) for stack in stacks for block in bridge._modules[stack]]
    found = []
    for layer in layers:
        if (match := find_container(layer)) is not None:
            family, block = match
            modules = {"layer": layer, "block": block}
            modules |= {"experts": child(block, family.experts_at), "router": child(block, family.router)}
            found.append(modules[part])
    return found


def offload(bridge: Any, part: str) -> None:
    """Takes a part of every MoE layer (or every single module) out of memory until it is called."""
    if part == "each":
        cpu_offload(bridge.original_model, execution_device="cpu", offload_buffers=True)
        return
    for module in parts_of(bridge, part):
        keep = {"offload": True, "offload_buffers": True, "place_submodules": True}
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", **keep))


def empty(value: Tensor, hook: Any) -> None:
    value[:, ::2, -1] = -1


def assert_as_in_memory(moe: MoEHooks, reference: MoEHooks, family: str) -> None:
    assert any(parameter.is_meta for parameter in moe.bridge.original_model.parameters())
    seen, expected = cache_of(moe, family), cache_of(reference, family)
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], expected[name]) for name in expected)
    assert torch.equal(logits_of(moe.bridge, family), logits_of(reference.bridge, family))
    layer = moe.layers[-1]
    for hook, edit in (("router_logits", negate), ("expert_indices", empty)):
        edits = [(moe.hook_name(hook, layer), edit)]
        assert torch.equal(run_hooked(moe, family, edits), run_hooked(reference, family, edits))


def test_every_hook_of_an_offloaded_model(family: str) -> None:
    reference = attach_to(family)
    # one way a family, so that all families and all ways are met
    i = tiny.FAMILIES.index(family)
    part = PARTS[1 + i % 3] if family in ONLY_IN_PARTS or i % 4 else "each"
    bridge = build(family)
    if i % 2:
        offload(bridge, part)
        moe = attach(bridge)
    else:
        moe = attach(bridge)
        offload(bridge, part)
    assert_as_in_memory(moe, reference, family)
    plain = logits_of(bridge, family)
    moe.detach()
    assert torch.equal(logits_of(bridge, family), plain)


@pytest.mark.parametrize("part", [*PARTS, "each"])
@pytest.mark.parametrize("family", ["olmoe", "ernie4_5_moe"])
def test_every_way_of_offloading(family: str, part: str) -> None:
    moe = attach_to(family)
    offload(moe.bridge, part)
    assert device_of(moe.bridge.original_model).type == "cpu"
    assert_as_in_memory(moe, attach_to(family), family)


def test_verify_on_a_model_whose_blocks_are_offloaded() -> None:
    moe = attach_to("deepseek_v3")
    offload(moe.bridge, "block")
    table = moe.verify(TOKENS, layers=moe.layers[:1])
    assert table.ok, table[~table["passed"]]


def items() -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    ids = draw.integers(3, 90, (4, 7)).tolist()
    rows = [(f"i{i}", "ab"[i % 2], row[:5], row[5:]) for i, row in enumerate(ids)]
    return [dict(zip(("id", "domain", "prompt", "answer"), row)) for row in rows]


@pytest.mark.parametrize("family", ["deepseek_v3"])
def test_experiments_and_verify_on_a_model_on_disk(family: str, tmp_path: Path) -> None:
    reference, moe = attach_to(family), attach_to(family)
    disk_offload(moe.bridge.original_model, str(tmp_path), execution_device="cpu")
    layer = moe.layers[0]
    assert moe.verify(TOKENS, layers=[layer]).ok
    found, expected = (
        mi.isolate_experts(each, items()[:2], layers=[layer], experts=[0, 5], random_draws=1, progress=False).data[
            "delta"
        ]
        for each in (moe, reference)
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)
    routes = torch.rand(2, 8, 5, 8, generator=torch.Generator().manual_seed(0)).topk(moe.spec(layer).top_k).indices
    for method, positions in (("branch", None), ("naive", [1, 5])):
        scored = [
            mi.score_routes(each, TOKENS, layer, routes[:, :, :2], positions, method=method)
            for each in (moe, reference)
        ]
        torch.testing.assert_close(*scored, atol=2e-5, rtol=0, equal_nan=True)
    screened = [mi.screen_routes(each, TOKENS, [layer], {layer: routes}, audit=4)[layer] for each in (moe, reference)]
    torch.testing.assert_close(screened[0].credit, screened[1].credit, atol=2e-5, rtol=0, equal_nan=True)
    torch.testing.assert_close(screened[0].logp, screened[1].logp, atol=2e-5, rtol=0, equal_nan=True)
