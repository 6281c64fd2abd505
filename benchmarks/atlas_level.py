"""How often tests of domains reject where nothing differs: python benchmarks/atlas_level.py [--corpora 2000]

Sequences have a random liking for experts each, and labels that say nothing of it. Prints the share of corpora rejected
at .05 by labels permuted over sequences, by any cell of the table, and by a chi-square test over tokens.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy import stats

from moe_interp.traces import RoutingTrace, domain_differences


def corpus(rng: np.random.Generator, n_sequences: int = 10, length: int = 20, n_experts: int = 8) -> RoutingTrace:
    liking = np.repeat(rng.normal(size=(n_sequences, 1, n_experts)), length, axis=0)
    keys = liking + rng.gumbel(size=liking.shape)
    labels = rng.permutation(["a", "b"] * (n_sequences // 2)).tolist()
    return RoutingTrace.from_arrays(
        (-keys).argsort(-1)[..., :2], None, [length] * n_sequences, n_experts, domain=labels
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=int, default=2000)
    n = parser.parse_args().corpora
    rejected = np.zeros(3)
    for seed in range(n):
        trace = corpus(np.random.default_rng(seed))
        found = domain_differences(trace, 199, seed)
        table = trace.counts(trace.domain_codes, 2)[:, 0]
        chi_square = stats.chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue
        any_cell = float(found["q"].min()) <= 0.05
        rejected += [float(found["information_p"][0]) <= 0.05, any_cell, chi_square <= 0.05]
    names = ("labels permuted over sequences", "any cell at q <= .05", "chi-square over tokens")
    for name, share in zip(names, rejected / n):
        print(f"{name}: {share:.3f} of {n}")


if __name__ == "__main__":
    main()
