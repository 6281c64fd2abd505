"""Time and memory of counting a large corpus part by part: python benchmarks/atlas.py [--routes 10000000]

Random routes of a model with 64 experts and top-8, made on the way and never held together: a stream of parts of whole
sequences into RoutingCounts, then load, domain specialization and co-activation. Prints seconds of counting (without
the making of routes), seconds of the measures, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from moe_interp.traces import RoutingCounts, RoutingTrace, co_activation, domain_specialization, load

DOMAINS = ("code", "law", "math", "prose")


def part(
    rng: np.random.Generator, n_sequences: int, length: int, n_layers: int, n_experts: int, k: int
) -> RoutingTrace:
    """Routes of a part: k different experts, some more liked than others."""
    n = n_sequences * length
    liking = np.linspace(1.5, 0, n_experts, dtype=np.float32)
    indices = np.empty((n, n_layers, k), dtype=np.uint8)
    for layer in range(n_layers):
        keys = liking + rng.gumbel(size=(n, n_experts)).astype(np.float32)
        indices[:, layer] = np.argpartition(-keys, k, axis=1)[:, :k]
    labels = [DOMAINS[i % len(DOMAINS)] for i in range(n_sequences)]
    return RoutingTrace.from_arrays(indices, None, [length] * n_sequences, n_experts, domain=labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--routes", type=int, default=10_000_000, help="token-layer routes")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    args = parser.parse_args()
    rng, length, n_sequences = np.random.default_rng(0), 512, 32
    tokens_a_part = length * n_sequences
    counts = RoutingCounts(range(args.layers), args.experts, ["sequences", "co_activation"])
    counting = wall = 0.0
    while counts.n_tokens * args.layers < args.routes:
        new = part(rng, n_sequences, length, args.layers, args.experts, args.top_k)
        before, started = time.process_time(), time.perf_counter()
        counts.update(new)
        counting, wall = counting + time.process_time() - before, wall + time.perf_counter() - started
    started = time.process_time()
    load(counts), domain_specialization(counts), co_activation(counts)
    measures = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{counts.n_tokens * args.layers:,} token-layer routes ({args.experts} experts, top-{args.top_k}, parts of "
        f"{tokens_a_part} tokens): counted in {counting:.1f} s of CPU ({wall:.1f} s), measured in {measures:.1f} s; "
        f"peak memory {peak:.2f} GiB"
    )


if __name__ == "__main__":
    main()
