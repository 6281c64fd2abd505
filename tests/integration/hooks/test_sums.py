"""What the hooks show adds up to what the layer computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests import tiny
from tests.integration.hooks.support import TOKENS, Opened, assert_moved, assert_near, opened
from tests.integration.hooks.test_order import weighted_sum


def native_outputs(model: Opened, pick: Callable[[tiny.NativeMoE], Any]) -> dict[tiny.Label, Tensor]:
    """What a module of each MoE layer of the untouched model returns, ``[batch, pos, d_model]``."""
    outputs: dict[tiny.Label, Tensor] = {}

    def record(label: tiny.Label) -> Callable[..., None]:
        def keep(module: Any, args: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            outputs[label] = out.detach().clone().reshape(*TOKENS.shape, -1)

        return keep

    handles = [pick(layer).register_forward_hook(record(label)) for label, layer in model.native.items()]
    try:
        model.native_logits()
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def test_weighted_expert_outputs_add_up_to_routed_out(family: str) -> None:
    model = opened(family)
    _, seen = model.see()
    for label in model.labels:
        assert_near(weighted_sum(model, seen, label), seen["routed_out", label], where=label)
        # and without the experts' hooks, where the model computes the sum itself
        _, alone = model.see(only=["routed_out"])
        assert_near(alone["routed_out", label], seen["routed_out", label], where=label)


def test_routed_and_shared_out_add_up_to_the_block(family: str) -> None:
    """With JetMoE's bias; on Gemma 4 the block is the layer, so the experts' module is compared instead."""
    model = opened(family)
    is_gemma = family.startswith("gemma4")
    blocks = native_outputs(model, lambda layer: layer.experts if is_gemma else layer.block)
    _, seen = model.see()
    for label, block_out in blocks.items():
        total = seen["routed_out", label]
        if ("shared_out", label) in seen and family != "granite_moe_hybrid":  # its shared MLP is beside the block
            assert_moved(total, block_out, 0.01)
            total = total + seen["shared_out", label]
        if family == "jetmoe":
            total = total + model.native[label].block.bias.detach()
        assert_near(total, block_out, where=label)


def test_granite_hybrid_s_shared_experts_sit_beside_the_block() -> None:
    model = opened("granite_moe_hybrid")
    layers = {label: model.hf.model.layers[label] for label in model.labels}
    shared = native_outputs(model, lambda layer: layers[layer.label].shared_mlp)
    _, seen = model.see()
    for label in model.labels:
        assert_near(seen["shared_out", label], shared[label])


def test_edits_of_the_parts_reach_the_block_as_written(family: str) -> None:
    """Adding a constant to ``routed_out`` or ``shared_out`` adds it to the block; a scaled output its share."""
    model = opened(family)
    if family.startswith("gemma4"):
        return  # a norm follows
    label = model.last
    noise = torch.randn(*TOKENS.shape, 32, generator=torch.Generator().manual_seed(1))

    def inject(module: Any, args: Any, out: Any) -> Any:
        added = noise.reshape((out[0] if isinstance(out, tuple) else out).shape)
        return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added

    handle = model.native[label].block.register_forward_hook(inject)
    try:
        expected = model.native_logits()
    finally:
        handle.remove()
    for hook in ("routed_out", "shared_out"):
        if hook in model.moe.hooks(label):
            alone = model.run([(hook, label, lambda x: x + noise)])
            assert_near(alone, expected, where=hook)
            with_all, _ = model.see([(hook, label, lambda x: x + noise)], labels=[label])
            assert_near(with_all, expected, where=hook)
    # half of one slot's output, by hand: routed_out less half of what it adds
    _, seen = model.see(labels=[label])
    first = seen["expert_out", label][:, :, 0]
    share = first if family.startswith("llama4") else first * seen["expert_weights", label][:, :, :1]

    def halve(x: Tensor) -> None:
        x[:, :, 0] *= 0.5

    assert_near(
        model.run([("expert_out", label, halve)]), model.run([("routed_out", label, lambda x: x - 0.5 * share)])
    )


def test_an_ablated_shared_expert_is_the_model_without_it(family: str) -> None:
    model, label = opened(family), opened(family).last
    if "shared_out" not in model.moe.hooks(label):
        return
    if family == "granite_moe_hybrid":
        module = model.hf.model.layers[label].shared_mlp
    else:
        block: Any = model.native[label].block
        module = block.shared_expert if hasattr(block, "shared_expert") else block.shared_experts
    handle = module.register_forward_hook(lambda m, a, out: torch.zeros_like(out))
    try:
        expected = model.native_logits()
    finally:
        handle.remove()
    edited = model.run([("shared_out", label, lambda x: x.zero_())])
    assert_near(edited, expected)
    assert_moved(edited, model.run())
