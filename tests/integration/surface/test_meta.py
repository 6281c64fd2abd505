"""Attaching reads shapes only: a model that no machine here could hold attaches on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe_interp.hooks.attach import attach


class Recorded(TorchDispatchMode):
    """Keeps the name of every tensor operation that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


def test_attaching_to_a_large_model_on_the_meta_device_touches_no_tensor() -> None:
    config = Qwen3MoeConfig(num_hidden_layers=48, num_experts=128, num_experts_per_tok=8)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).eval()
    bridge = build_bridge_from_module(model, "Qwen3MoeForCausalLM", hf_config=config)
    with Recorded() as recorded:
        moe = attach(bridge)
        spec = moe.spec(47)
        rule = spec.rule
        moe.detach()
    assert recorded.operations == []
    assert len(moe.layers) == 48
    assert (spec.n_experts, spec.top_k, spec.d_model, spec.d_expert) == (128, 8, config.hidden_size, 768)
    assert rule.top_k == 8
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
