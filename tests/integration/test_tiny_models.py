"""The tiny models can catch a mistake: their routers and experts matter, measured with torch alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import tiny

TOKENS = tiny.random_tokens(4, 12)


def zeroed_layer_effect(hf: torch.nn.Module, name: str, layer: tiny.NativeMoE, logits: Tensor) -> float:
    """Largest change of the logits when no routed expert of one layer contributes."""
    handle = layer.experts.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    try:
        return float((tiny.native_logits(hf, name, TOKENS) - logits).abs().max())
    finally:
        handle.remove()


def test_routers_spread_their_logits_without_near_ties(family: str) -> None:
    hf = tiny.build_hf(family)
    with tiny.recorded_inputs(hf) as inputs:
        tiny.native_logits(hf, family, TOKENS)
    layers = tiny.native_layers(hf)
    assert set(inputs) == set(layers)
    for label, layer in layers.items():
        logits = tiny.raw_logits(layer, inputs[label])
        assert logits.std() >= 1.0, label
        assert logits.sort(-1).values.diff(dim=-1).min() >= 1e-5, label


def test_silencing_the_experts_of_a_layer_moves_the_logits(family: str) -> None:
    hf = tiny.build_hf(family)
    logits = tiny.native_logits(hf, family, TOKENS)
    for label, layer in tiny.native_layers(hf).items():
        assert zeroed_layer_effect(hf, family, layer, logits) >= 0.5, label


def neutral(name: str, tensor: Tensor) -> Tensor:
    """The value at which a tensor does nothing: what a mistake that leaves it out amounts to."""
    if not tensor.is_floating_point():
        return tensor.flip(0)
    return torch.ones_like(tensor) if name.endswith("scale") else torch.zeros_like(tensor)


def test_every_tensor_of_routers_and_experts_matters(family: str) -> None:
    hf = tiny.build_hf(family)
    logits = tiny.native_logits(hf, family, TOKENS)
    for label, layer in tiny.native_layers(hf).items():
        state = tiny.routing_state(layer)
        saved = {name: tensor.detach().clone() for name, tensor in state.items()}
        for group in {re.sub(r"\d+", "#", name) for name in state}:  # one expert of a list may serve no token here
            names = [name for name in state if re.sub(r"\d+", "#", name) == group]
            with torch.no_grad():
                for name in names:
                    state[name].copy_(neutral(name, saved[name]))
                moved = (tiny.native_logits(hf, family, TOKENS) - logits).abs().max()
                for name in names:
                    state[name].copy_(saved[name])
            assert moved >= 0.02, (label, group)


def test_a_seed_fixes_the_weights_and_copies_are_independent() -> None:
    first, other_seed = tiny.build_hf("deepseek_v3"), tiny.build_hf("deepseek_v3", seed=1)
    reference = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    again = tiny.build_hf("deepseek_v3").state_dict()
    assert all(torch.equal(again[name], reference[name]) for name in reference)
    key = "model.layers.1.mlp.gate.weight"
    assert not torch.equal(other_seed.state_dict()[key], reference[key])


def test_bridging_leaves_the_given_model_untouched(family: str) -> None:
    hf = tiny.build_hf(family)
    logits = tiny.native_logits(hf, family, TOKENS)
    bridge = tiny.build_bridge(hf, family)
    with torch.no_grad():
        bridged = bridge(TOKENS, **tiny.model_inputs(family, TOKENS))
    assert not any("Bridge" in type(module).__name__ for module in hf.modules())
    assert torch.equal(tiny.native_logits(hf, family, TOKENS), logits)
    torch.testing.assert_close(bridged, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_implementation_reaches_the_experts(implementation: str) -> None:
    hf = tiny.build_hf("qwen3_moe")
    logits = tiny.native_logits(hf, "qwen3_moe", TOKENS)
    bridge = tiny.build_bridge(hf, "qwen3_moe")
    for model in (hf, bridge):
        tiny.set_experts_implementation(model, implementation)
        experts = [module for module in model.modules() if type(module).__name__ == "Qwen3MoeExperts"]
        assert experts
        assert all(module.config._experts_implementation == implementation for module in experts)
    torch.testing.assert_close(tiny.native_logits(hf, "qwen3_moe", TOKENS), logits, rtol=0, atol=5e-6)


class _Float32Spy(TorchDispatchMode):
    """Collects the names of operations that return float32."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.dtype == torch.float32 for leaf in tree_leaves(output)):
            self.seen.add(str(func))
        return output


def test_float64_casts_leave_no_float32_and_shrink_rounding(family: str) -> None:
    hf = tiny.build_hf(family, dtype=torch.float64)
    tiny.set_experts_implementation(hf, "eager")
    with _Float32Spy() as spy, tiny.float64_casts():
        together = tiny.native_logits(hf, family, TOKENS)
    with tiny.float64_casts():
        alone = torch.cat([tiny.native_logits(hf, family, row[None]) for row in TOKENS])
    assert spy.seen == set()
    assert together.dtype == torch.float64
    assert (together - alone).abs().max() <= 1e-12
    assert torch.get_default_dtype() == torch.float32


def test_rank_one_update_gives_the_wanted_logits(family: str) -> None:
    hf, token = tiny.build_hf(family), TOKENS[:1, :1]
    before = tiny.native_logits(hf, family, token)
    with tiny.recorded_router_inputs(hf) as router_inputs:
        tiny.native_logits(hf, family, token)
    for label, hidden in router_inputs.items():
        updated = tiny.build_hf(family)
        wanted = 2.0 * torch.randn(8, generator=torch.Generator().manual_seed(2))
        tiny.rank_one_router_update(updated, label, hidden, wanted)
        with tiny.recorded_inputs(updated) as inputs:
            after = tiny.native_logits(updated, family, token)
        logits = tiny.raw_logits(tiny.native_layers(updated)[label], inputs[label])
        torch.testing.assert_close(logits[0], wanted, rtol=0, atol=1e-5)
        assert (after - before).abs().max() >= 0.01, label
