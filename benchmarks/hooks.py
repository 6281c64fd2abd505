"""What attaching and hooking cost: ratios to the unattached bridge, run by run in one process.

    python benchmarks/hooks.py [--rounds 40] [--implementation eager]

An OLMoE-shaped model of 8 layers (width 256, 32 experts, top-4), 4 x 128 tokens, under each experts implementation of
transformers. Every round times every way once, in random order, and the table gives the median over rounds of the ratio
to the same round's unattached run. Times are processor time on one thread, which other work on the machine disturbs
least. Caching is compared with TransformerLens caching as many of its own activations.
Last, the time to attach to a Qwen3-MoE of 48 layers x 128 experts on the meta device.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import OlmoeConfig, OlmoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe_interp.hooks.attach import attach

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
ROUTER_HOOKS = ("router_in", "router_logits", "router_probs", "expert_indices", "expert_weights")
WARM_UP = 2
LIMITS = {"attached, nothing hooked": 1.02, "router hooks read": 1.05, "expert_out cached": 1.25}


def build(implementation: str) -> TransformerBridge:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=32,
        num_experts_per_tok=4,
    )
    config._experts_implementation = implementation
    model = OlmoeForCausalLM(config).eval()
    return build_bridge_from_module(model, "OlmoeForCausalLM", hf_config=config)


def read(activation: torch.Tensor, hook: Any) -> None:
    """A hook that only looks."""


def ways(bridge: TransformerBridge, tokens: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed; the two called unattached are what the others are compared with."""
    own = [f"blocks.{layer}.hook_mlp_out" for layer in range(8)]
    readers: list[Any] = [(f"blocks.{layer}.hook_{name}", read) for layer in range(8) for name in ROUTER_HOOKS]
    every = re.compile(r"blocks\.\d+\.hook_(router|expert|routed)_").match
    return {
        "unattached": lambda: bridge(tokens),
        "attached, nothing hooked": lambda: bridge(tokens),
        "router hooks read": lambda: bridge.run_with_hooks(tokens, fwd_hooks=readers),
        "unattached, mlp_out cached": lambda: bridge.run_with_cache(tokens, names_filter=own),
        "expert_out cached": lambda: bridge.run_with_cache(
            tokens, names_filter=lambda name: name.endswith("hook_expert_out")
        ),
        "every hook cached": lambda: bridge.run_with_cache(tokens, names_filter=lambda name: bool(every(name))),
    }


def seconds_of(name: str, way: Callable[[], Any], bridge: TransformerBridge) -> float:
    """One run on the same weights in the same memory, attached or not."""
    with nullcontext() if name.startswith("unattached") else attach(bridge):
        start = time.process_time()
        way()
        return time.process_time() - start


def measure(implementation: str, rounds: int) -> None:
    bridge = build(implementation)
    tokens = torch.randint(1024, (4, 128), generator=torch.Generator().manual_seed(0))
    table = ways(bridge, tokens)
    times: dict[str, list[float]] = {name: [] for name in table}
    order = list(table)
    with torch.no_grad():
        for turn in range(WARM_UP + rounds):
            random.Random(turn).shuffle(order)
            for name in order:
                elapsed = seconds_of(name, table[name], bridge)
                if turn >= WARM_UP:
                    times[name].append(elapsed)
    print(f"\n{implementation}: median ms, and median ratio to the same round's unattached run")
    for name, seconds in times.items():
        cached = "cached" in name and name != "unattached, mlp_out cached"
        ratios = [_ratio(seconds, times["unattached"])]
        ratios += [_ratio(seconds, times["unattached, mlp_out cached"])] if cached else []
        limit = f"  (at most {LIMITS[name]})" if name in LIMITS else ""
        shown = f"{ratios[0]:.3f}" + (f", to caching mlp_out {ratios[1]:.3f}" if cached else "")
        print(f"  {name:<28}{1e3 * statistics.median(seconds):8.1f}   {shown}{limit}")


def _ratio(seconds: list[float], reference: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(seconds, reference))


def time_attaching() -> None:
    config = Qwen3MoeConfig(num_hidden_layers=48, num_experts=128, num_experts_per_tok=8, decoder_sparse_step=1)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).eval()
    bridge = build_bridge_from_module(model, "Qwen3MoeForCausalLM", hf_config=config)
    start = time.perf_counter()
    moe = attach(bridge)
    elapsed = time.perf_counter() - start
    size = f"{len(moe.layers)} layers x {moe.spec(0).n_experts} experts"
    print(f"\nattaching to {size} on the meta device: {elapsed:.3f} s (at most 2)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for implementation in options.implementation or IMPLEMENTATIONS:
        measure(implementation, options.rounds)
    time_attaching()


if __name__ == "__main__":
    main()
