"""How many tokens a forward pass may hold."""

from __future__ import annotations

import math

import psutil
import torch

from moe_interp.arch.offload import device_of
from moe_interp.arch.products import without_compiled
from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks

CPU_TOKENS = 2048  # larger passes fall out of a CPU's caches


def tokens_per_pass(
    moe: MoEHooks,
    width: int,
    memory_budget: int | None = None,
    *,
    kept_layers: int = 0,
    kept_tokens: int = 0,
    reads_per_token: float = 0.0,
) -> int:
    """Tokens that fit into a budget, from an estimate of what a layer computes and what is kept (derived).

    Args:
        moe: Attached hooks.
        width: Longest sequence.
        memory_budget: Bytes; half of what is free by default.
        kept_layers: Layers whose prefixes are kept beside the pass.
        kept_tokens: Tokens that there are at most to keep them of.
        reads_per_token: Predictions read for each token of a pass, at most.

    Raises:
        ConfigError: a budget in which not even one sequence fits.
    """
    parameter, device = next(moe.bridge.original_model.parameters()), device_of(moe.bridge.original_model)
    budget = memory_budget if memory_budget is not None else _free_bytes(device) // 2
    spec, cfg = moe.spec(moe.layers[0]), moe.bridge.cfg
    heads = int(getattr(cfg, "n_heads", 0) or 0)
    mlp = max(int(getattr(cfg, "d_mlp", 0) or 0), spec.top_k * (3 * spec.d_expert + 3 * spec.d_model))
    logits = math.ceil(2 * reads_per_token * int(getattr(cfg, "d_vocab", 0) or 0))  # and their log-probabilities
    size = max(4, parameter.element_size())
    # residual, norms, projections and their temporaries; attention scores of one layer in steps
    per_token = size * (24 * spec.d_model + mlp + 6 * heads * width + logits)
    kept = size * 4 * kept_layers * spec.d_model  # the input, the norms' and the attention's answers

    def fitting(available: int) -> int:
        tokens = available // (per_token + kept)
        return tokens if tokens <= kept_tokens else (available - kept * kept_tokens) // per_token

    if fitting(budget) < width:
        raise ConfigError(
            f"a memory budget of {budget / 2**20:.3f} MiB",
            f"at least {(per_token + kept) * width / 2**20:.3f} MiB for one sequence of {width} tokens",
            "Raise memory_budget, or leave the longest items out.",
        )
    tokens = max(fitting(without_compiled(budget, parameter)), width)
    limit = CPU_TOKENS if device.type == "cpu" else 256 * CPU_TOKENS
    return int(min(tokens, max(limit, width)))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
