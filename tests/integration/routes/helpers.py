"""Attached tiny models and random routes for them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import pytest
import torch
from torch import Tensor

from moe_interp.hooks.attach import MoEHooks, attach
from tests import tiny

DECODERS = [name for name in tiny.FAMILIES if name not in tiny.ENCODER_DECODERS]

# why branches stop at a layer: what a token reads there is not the plain keys and values of earlier positions
SERVED_FROM = {
    "deepseek_v4": (),
    "glm_moe_dsa": (),
    "jamba": (3,),
    "lfm2_moe": (2,),
}


@cache
def attached(name: str, dtype: torch.dtype = torch.float32, attention: str = "eager") -> MoEHooks:
    """One attached tiny model a family, shared by the tests; they leave nothing behind on it."""
    hf = tiny.build_hf(name, dtype=dtype, attn_implementation=attention)
    if dtype == torch.float64:
        tiny.set_experts_implementation(hf, "eager")
    moe = attach(tiny.build_bridge(hf, name))
    _BUILT[moe] = settings(moe)
    return moe


_BUILT: dict[MoEHooks, object] = {}
"""The shared models' settings, as they were built."""


def settings(moe: MoEHooks) -> object:
    """What a test could leave changed on a shared model."""
    model = moe.bridge.original_model
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    return (
        model.training,
        [str(sorted((key, str(value)) for key, value in vars(config).items())) for config in configs.values()],
        sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in moe.bridge.hook_dict.values()),
    )


def changed_models() -> list[str]:
    """The shared models that are not as they were built."""
    return [moe.bridge.cfg.model_name for moe, built in _BUILT.items() if settings(moe) != built]


def with_windows(name: str, kind: str, attention: str) -> MoEHooks:
    """A float64 model one of whose layers above the first reads a window, or a chunk, of 5 positions only."""
    window = {"sliding_window": 5} if kind == "sliding_attention" else {"attention_chunk_size": 5}
    kinds = (
        ["full_attention", "full_attention", kind] if name == "llama4" else ["full_attention", kind, "full_attention"]
    )
    entry = {**tiny.CONFIGS[name], "config": {**tiny.CONFIGS[name]["config"], "layer_types": kinds, **window}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.CONFIGS, f"{name}-windows", entry)
        hf = tiny.build_hf(f"{name}-windows", dtype=torch.float64, attn_implementation=attention)
        tiny.set_experts_implementation(hf, "eager")
        return attach(tiny.build_bridge(hf, f"{name}-windows"))


def served_layers(name: str, moe: MoEHooks) -> tuple[int, ...]:
    return SERVED_FROM.get(name, moe.layers)  # type: ignore[arg-type]


def precision(dtype: torch.dtype) -> AbstractContextManager[None]:
    return tiny.float64_casts() if dtype == torch.float64 else nullcontext()


def random_routes(moe: MoEHooks, layer: int, tokens: Tensor, n_routes: int = 2, seed: int = 0) -> Tensor:
    """``[batch, pos, route, slot]``."""
    spec = moe.spec(layer)
    keys = torch.rand(*tokens.shape, n_routes, spec.n_experts, generator=torch.Generator().manual_seed(seed))
    return keys.topk(spec.top_k, dim=-1).indices


def padded_batch() -> tuple[Tensor, Tensor]:
    """Three sequences of 12, 9 and 8 tokens: unpadded, padded on the left, padded on the right."""
    tokens = tiny.random_tokens(3, 12)
    mask = torch.ones_like(tokens)
    mask[1, :3], mask[2, -4:] = 0, 0
    return tokens, mask


def largest_difference(left: Tensor, right: Tensor) -> float:
    """NaN must be at the same places."""
    assert torch.equal(left.isnan(), right.isnan())
    return float((left - right).abs().nan_to_num().max())
