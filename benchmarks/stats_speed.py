"""Seconds for a family of 896 signed-rank tests with ties, zeros and an all-zero row, against scipy row by row.

    python benchmarks/stats_speed.py

scipy is given its normal approximation, its cheapest method; it has no exact null with ties.
"""

from __future__ import annotations

import time

import numpy as np
from scipy import stats as scipy_stats

from moe_interp import stats

TESTS = 896


def main() -> None:
    print(f"{'n':>4} {'ours, s':>9} {'scipy, s':>9} {'ratio':>7}   ({TESTS} tests; ours exact up to n = 25)")
    for n in (10, 12, 25, 50):
        x = np.round(2 * stats.derive_rng(0, "speed", n).standard_normal((TESTS, n))) / 2
        x[0] = 0
        start = time.perf_counter()
        stats.wilcoxon_signed_rank(x)
        ours = time.perf_counter() - start
        start = time.perf_counter()
        for row in x[1:]:  # scipy has no p-value for a row of zeros
            scipy_stats.wilcoxon(row, zero_method="pratt", method="asymptotic")
        theirs = time.perf_counter() - start
        print(f"{n:>4} {ours:>9.3f} {theirs:>9.3f} {theirs / ours:>7.1f}")


if __name__ == "__main__":
    main()
