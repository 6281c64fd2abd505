"""What scoring counterfactual routes costs: branches against full forwards, interleaved in one process.

    python benchmarks/counterfactual.py [--threads 1] [--rounds 3] [--routes 32] [--lengths 64 128 256]

An OLMoE-shaped model (8 layers, width 256, 32 experts of 256, top-4, vocabulary 8192) through a TransformerBridge,
every layer, random routes. Every round times every way once, in random order; the best of the rounds counts. On one
thread, times are processor time, which other work on the machine disturbs least. Full forwards are timed on a few
routes, as all of them would take hours; branches on all routes of all tokens and layers, the plain forward and the
experts' outputs included.

The limit counts the arithmetic that is left: one plain forward, every expert once a token and layer, and one token a
branch through the layers above and the unembedding, at the rate of a large float32 matrix product timed in each round:
torch's own (``a @ b``, which every way but branches uses), and the faster of the two that torch carries. Branches are
also timed with the faster one switched off, so that their share at torch's rate compares like with like.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_interp.engine.cpu.matmul import linear
from moe_interp.engine.recorded_pass import record_pass
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.routes import check_routes, score_from_base

try:
    import nnsight
except ImportError:  # compared where it is installed
    nnsight = None

LAYERS, WIDTH, EXPERTS, TOP_K, EXPERT_WIDTH, VOCABULARY, HEADS = 8, 256, 32, 4, 256, 8192, 8
COPIES = (4, 8, 16, 32)
REQUIRED = {"run_with_hooks": 300, "run_with_hooks, batched": 200, "hooks on transformers, batched": 200}


def build() -> tuple[OlmoeForCausalLM, MoEHooks]:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=EXPERT_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    plain = OlmoeForCausalLM(config).eval()
    bridged = OlmoeForCausalLM(config).eval()
    bridged.load_state_dict(plain.state_dict())
    return plain, attach(build_bridge_from_module(bridged, "OlmoeForCausalLM", hf_config=config))


class Ways:
    """The ways of scoring; each gives how many routes it scored."""

    def __init__(self, plain: OlmoeForCausalLM, moe: MoEHooks, length: int, n_routes: int) -> None:
        self.plain, self.moe, self.n_routes = plain, moe, n_routes
        self.tokens = torch.randint(3, VOCABULARY, (1, length))
        keys = torch.rand(LAYERS, 1, length, n_routes, EXPERTS)
        self.routes = keys.topk(TOP_K, dim=-1).indices
        self.middle = LAYERS // 2  # full forwards cost the same at every layer and position

    def branches(self, memory_budget: int | None = None) -> int:
        base = record_pass(self.moe, self.tokens, self.moe.layers)  # type: ignore[arg-type]
        for layer in range(LAYERS):
            routes = check_routes(base, layer, self.routes[layer])
            score_from_base(base, {layer: routes}, method="branch", memory_budget=memory_budget)
        return LAYERS * (self.tokens.shape[1] - 1) * self.n_routes

    def plain_branches(self) -> int:
        """Branches by torch's own products alone."""
        with warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=False):
            return self.branches()

    @torch.no_grad()
    def hooked(self, copies: int, forwards: int = 1) -> int:
        pos = self.tokens.shape[1] // 2
        for _ in range(forwards):

            def put(value: Tensor, hook: Any) -> Tensor:
                value[:, pos] = self.routes[self.middle, 0, pos].repeat(copies, 1)[:copies]
                return value

            hooks = [(self.moe.hook_name("expert_indices", self.middle), put)]
            logits = self.moe.bridge.run_with_hooks(self.tokens.expand(copies, -1), fwd_hooks=hooks)
            logits[:, pos].log_softmax(-1)[:, self.tokens[0, pos + 1]]
        return copies * forwards

    @torch.no_grad()
    def hooked_transformers(self, copies: int) -> int:
        pos, length = self.tokens.shape[1] // 2, self.tokens.shape[1]

        def put(module: Any, args: Any, output: Any) -> Any:
            logits, weights, indices = output
            route = self.routes[self.middle, 0, pos].repeat(copies, 1)[:copies]
            rows = torch.arange(copies) * length + pos
            chosen = logits.softmax(-1)[rows].gather(-1, route)
            return logits, weights.index_copy(0, rows, chosen), indices.index_copy(0, rows, route)

        handle = self.plain.model.layers[self.middle].mlp.gate.register_forward_hook(put)
        try:
            logits = self.plain(self.tokens.expand(copies, -1), use_cache=False).logits
            logits[:, pos].log_softmax(-1)[:, self.tokens[0, pos + 1]]
        finally:
            handle.remove()
        return copies

    @torch.no_grad()
    def traced(self, copies: int) -> int:
        """The same patch written for nnsight, on the transformers model."""
        pos, length = self.tokens.shape[1] // 2, self.tokens.shape[1]
        route, tokens = self.routes[self.middle, 0, pos][:copies], self.tokens
        model = nnsight.NNsight(self.plain)
        with model.trace(tokens.expand(copies, -1), use_cache=False):
            gate = model.model.layers[self.middle].mlp.gate
            logits, weights, indices = gate.output
            rows = torch.arange(copies) * length + pos
            chosen = logits.softmax(-1)[rows].gather(-1, route)
            gate.output = (logits, weights.index_copy(0, rows, chosen), indices.index_copy(0, rows, route))
            model.lm_head.output[:, pos].log_softmax(-1)[:, tokens[0, pos + 1]].save()
        return copies

    def table(self) -> dict[str, dict[str, Callable[[], int]]]:
        """Way -> its variants, of which the best counts."""
        return self.own_ways() | ({} if nnsight is None else {"nnsight, batched": self.each(self.traced)})

    def each(self, call: Callable[[int], int]) -> dict[str, Callable[[], int]]:
        return {f"{n} copies": lambda n=n: call(n) for n in COPIES}

    def own_ways(self) -> dict[str, dict[str, Callable[[], int]]]:
        return {
            "branches": {"": self.branches},
            "branches by a @ b": {"": self.plain_branches},
            "run_with_hooks": {"": lambda: self.hooked(1, forwards=4)},
            "run_with_hooks, batched": self.each(self.hooked),
            "hooks on transformers, batched": self.each(self.hooked_transformers),
        }


def arithmetic(length: int, n_routes: int) -> float:
    """Floating-point operations that no exact way can leave out, for all layers."""
    expert = 6 * WIDTH * EXPERT_WIDTH
    layer = 8 * WIDTH * WIDTH + 2 * WIDTH * EXPERTS + TOP_K * expert
    attended = sum(4 * WIDTH * (t + 1) for t in range(length))
    unembedding = 2 * WIDTH * VOCABULARY
    base = length * (LAYERS * layer + unembedding) + LAYERS * attended
    experts = (length - 1) * LAYERS * EXPERTS * expert
    n_branches = (length - 1) * n_routes
    above = LAYERS * (LAYERS - 1) // 2
    branches = n_branches * (above * layer + LAYERS * unembedding) + above * n_routes * attended
    return float(base + experts + branches)


@torch.no_grad()
def gemm_rate(clock: Callable[[], float], product: Callable[[Tensor, Tensor], Tensor], size: int = 1024) -> float:
    a, b = torch.randn(size, size), torch.randn(size, size)
    start = clock()
    for _ in range(4):
        product(a, b)
    return 4 * 2 * size**3 / (clock() - start)


def measure(ways: Ways, rounds: int, clock: Callable[[], float]) -> tuple[dict[str, float], float, float]:
    """Routes a second of each way, best of rounds and variants, and the best rates of torch's own and any product."""
    calls = [(way, call) for way, variants in ways.table().items() for call in variants.values()]
    best = dict.fromkeys(ways.table(), 0.0)
    own = fastest = 0.0
    for _ in range(rounds):
        for way, call in random.sample(calls, len(calls)):
            start = clock()
            n = call()
            best[way] = max(best[way], n / (clock() - start))
        own = max(own, gemm_rate(clock, torch.matmul))
        fastest = max(fastest, own, gemm_rate(clock, linear))
    return best, own, fastest


def report(best: dict[str, float], own: float, fastest: float, length: int, n_routes: int) -> None:
    a_route = arithmetic(length, n_routes) / (LAYERS * (length - 1) * n_routes)
    print(f"T {length}, R {n_routes}, {torch.get_num_threads()} thread(s)")
    for way, rate in best.items():
        ratio = best["branches"] / rate
        needed = f" (required {REQUIRED[way]})" if way in REQUIRED and length == 128 else ""
        print(f"  {way:32s} {rate:10.1f} routes/s   branches: {ratio:6.1f} x{needed}")
    print(f"  share of the limit at the rate of a @ b, {own / 1e9:.0f} GFLOP/s: ", end="")
    print(f"{best['branches'] * a_route / own:.2f}, by a @ b alone ", end="")
    print(f"{best['branches by a @ b'] * a_route / own:.2f} (required 0.63)")
    print(f"  share at the fastest product's rate, {fastest / 1e9:.0f} GFLOP/s: ", end="")
    print(f"{best['branches'] * a_route / fastest:.2f}")
    ratio = best["branches"] / best["run_with_hooks"] / length
    print(f"  ratio to run_with_hooks over T: {ratio:.2f} (required 1.5)")


def peak_memory(ways: Ways, budget: int) -> None:
    """How much the process grows by scoring within a budget, the plain forward beside it."""
    record_pass(ways.moe, ways.tokens, ways.moe.layers)  # type: ignore[arg-type]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ways.branches(budget)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(f"peak memory grows by {grown / 2**20:.0f} MiB under a budget of {budget / 2**20:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--routes", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128])
    parser.add_argument("--budget", type=int, default=2**28, help="bytes, for the measurement of peak memory")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    plain, moe = build()
    peak_memory(Ways(plain, moe, options.lengths[0], options.routes), options.budget)
    for length in options.lengths:
        report(*measure(Ways(plain, moe, length, options.routes), options.rounds, clock), length, options.routes)


if __name__ == "__main__":
    main()
