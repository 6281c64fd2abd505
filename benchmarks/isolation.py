"""Expert isolation: the prefix engine against run_with_hooks, one at a time and in its best batches.

    python benchmarks/isolation.py [--threads 1] [--items 4] [--engine-items 32] [--experts 32]

All ways score the same layers and experts, interleaved in one process, the best of --repeats; the table gives ratios.
run_with_hooks has fewer items than the engine, being slower; its forwards cost the same whatever their number. On one
thread, times are processor time, which other work on the machine disturbs least. The limit counts the matrix products
that the engine cannot avoid (each layer's prefix once, one expert a token at the isolated layer, the later layers, the
unembedding at the answers) at the matrix rate measured just before and after.
"""

from __future__ import annotations

import argparse
import resource
import threading
import time
from collections.abc import Callable

import psutil
import torch
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import OlmoeConfig, OlmoeForCausalLM

import moe_interp as mi
from moe_interp.engine.memory import tokens_per_pass
from moe_interp.experiments.inputs.items import ItemBatch, check_items, tokenize_items
from moe_interp.experiments.isolation.scoring import PrefixScorer

LAYERS, D_MODEL, EXPERTS, TOP_K, D_EXPERT, VOCAB, TOKENS, ANSWER = 8, 256, 32, 4, 256, 8192, 128, 4


def build() -> mi.MoEHooks:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=D_EXPERT,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=TOKENS,
    )
    model = OlmoeForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.1)
    return mi.attach(build_bridge_from_module(model, "OlmoeForCausalLM", hf_config=config))


def reads_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    logp = torch.log_softmax(logits[:, -ANSWER - 1 : -1], dim=-1)
    return logp.gather(-1, tokens[:, -ANSWER:].unsqueeze(-1)).squeeze(-1)


def naive(moe: mi.MoEHooks, tokens: torch.Tensor, cells: list[tuple[int, int]], rows: int) -> torch.Tensor:
    """run_with_hooks, ``rows`` items at a time."""
    found = []
    for layer, expert in cells:
        for part in tokens.split(rows):
            logits = moe.bridge.run_with_hooks(part, fwd_hooks=mi.force_experts(moe, layer, expert))
            found.append(reads_of(logits, part))
    return torch.cat(found).reshape(len(cells), *tokens[:, :ANSWER].shape)


def engine(moe: mi.MoEHooks, tokens: torch.Tensor, cells: list[tuple[int, int]], budget: int | None) -> torch.Tensor:
    """The prefix engine on the same cells, the natural pass and its self-check included."""
    raw = [
        {"id": str(i), "domain": "d", "prompt": t[:-ANSWER], "answer": t[-ANSWER:]}
        for i, t in enumerate(tokens.tolist())
    ]
    items = tokenize_items(moe.bridge, check_items(raw))
    kept = {"kept_layers": LAYERS, "kept_tokens": tokens.numel()}
    fits = tokens_per_pass(moe, TOKENS, budget, **kept, predictions_per_token=ANSWER / TOKENS)
    scorer = PrefixScorer(moe, "force", fits)
    per_pass = max(1, scorer.tokens // TOKENS)
    found = []
    for start in range(0, len(items), per_pass):
        index = list(range(start, min(start + per_pass, len(items))))
        batch = ItemBatch.build(index, items, "cpu")
        layers = sorted({layer for layer, _ in cells})
        scorer.begin(batch, layers, [])
        columns = []
        for layer in layers:
            experts = [(expert,) for where, expert in cells if where == layer]
            columns.append(scorer.sets(layer, experts, "one", torch.ones(1)))
        found.append(torch.cat(columns, -1).T.reshape(len(cells), len(index), ANSWER))
    return torch.cat(found, dim=1)


def matrix_rate(clock: Callable[[], float]) -> float:
    """Multiply-adds per second of float32 products of the shapes at hand, best of five."""
    a, b = torch.randn(2048, D_MODEL), torch.randn(D_MODEL, 2 * D_EXPERT)
    best = 0.0
    for _ in range(5):
        start = clock()
        for _ in range(20):
            a @ b
        best = max(best, 20 * a.shape[0] * a.shape[1] * b.shape[1] / (clock() - start))
    return best


def engine_work(n_items: int, cells: list[tuple[int, int]]) -> float:
    """Multiply-adds that the engine cannot avoid."""
    attention = 4 * D_MODEL**2 + 2 * TOKENS * D_MODEL / 2  # causal: half of the scores
    keys_values, expert = 2 * D_MODEL**2, 3 * D_MODEL * D_EXPERT
    router = D_MODEL * EXPERTS
    layer = attention + router + TOP_K * expert
    base = TOKENS * LAYERS * layer + ANSWER * D_MODEL * VOCAB
    total = base
    for index, _ in cells:
        later = LAYERS - 1 - index
        full = max(later - 1, 0) * TOKENS * layer
        last = (TOKENS * keys_values + ANSWER * (layer - keys_values)) if later else 0
        total += TOKENS * expert + full + last + ANSWER * D_MODEL * VOCAB
    return n_items * total


def peak_memory(function: Callable[[], object]) -> float:
    """Highest resident size during a call over that before it, in bytes."""
    process, stop, before = psutil.Process(), threading.Event(), psutil.Process().memory_info().rss
    highest = [before]

    def watch() -> None:
        while not stop.wait(0.002):
            highest[0] = max(highest[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    stop.set()
    watcher.join()
    return highest[0] - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--items", type=int, default=4, help="items of run_with_hooks")
    parser.add_argument("--engine-items", type=int, default=32)
    parser.add_argument("--experts", type=int, default=32, help="experts scored per layer (of 32)")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    moe = build()
    every = torch.randint(1, VOCAB, (max(arguments.items, arguments.engine_items), TOKENS))
    tokens = every[: arguments.items]
    cells = [(layer, expert) for layer in range(LAYERS) for expert in range(arguments.experts)]
    budget = 256 * 2**20
    # first: later passes reuse what was freed
    peak = peak_memory(lambda: engine(moe, every, cells[:: arguments.experts], budget))
    ways: dict[str, Callable[[], torch.Tensor]] = {"one at a time": lambda: naive(moe, tokens, cells, 1)}
    for rows in (2, 4, 8):
        if rows <= max(arguments.items, 2):
            ways[f"batches of {rows}"] = lambda rows=rows: naive(moe, tokens, cells, rows)
    ways["engine"] = lambda: engine(moe, every, cells, None)
    reference, best, shares = ways["one at a time"](), dict.fromkeys(ways, float("inf")), []
    work = engine_work(len(every), cells)
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            rate = matrix_rate(clock)
            start = clock()
            scores = way()
            seconds = clock() - start
            best[name] = min(best[name], seconds / scores[..., 0].numel())
            if name == "engine":  # beside the rate just before and after: a shared machine changes its speed
                shares.append(work / max(rate, matrix_rate(clock)) / seconds)
            # two float32 paths may route a token of no margin differently; that moves few reads
            assert ((scores[:, : len(tokens)] - reference).abs() > 2e-5).float().mean() < 1e-2, name
    print(
        f"forced forwards: {LAYERS} layers x {arguments.experts} experts x {len(tokens)} items (engine: {len(every)})"
    )
    print(f"{arguments.threads} thread(s), {2 * rate / 1e9:.0f} GFLOP/s measured")
    for name, seconds in best.items():
        print(f"{name:>15}: {1 / seconds:8.1f} a second")
    best_batch = min(seconds for name, seconds in best.items() if name.startswith("batch"))
    print(f"engine over one at a time: {best['one at a time'] / best['engine']:.2f}x (at least 2.4)")
    print(f"engine over best batching: {best_batch / best['engine']:.2f}x (at least 1.7)")
    print(f"of the limit: {' '.join(f'{share:.3f}' for share in shares)} (the best at least .6)")
    print(f"peak memory: {peak / 2**20:.0f} MiB of a budget of 256 MiB")
    print(f"peak of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")


if __name__ == "__main__":
    main()
