"""Tabulated coverage of the intervals at .95: what each really covers with n independent units."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

TABULATED_N = (2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100, 200)
# The least of the simulated laws and sizes (benchmarks/stats_coverage.py writes docs/stats-coverage.md): normal and
# exponential units, and for clusters sizes that are equal or log-normal with sd .5 and 1.
COVERAGE: dict[str, tuple[float, ...]] = {
    "small_sample": (0.95,) * 4 + (0.945,) * 9,
    "stratified": (0.83, 0.88, 0.905, 0.92, 0.93, 0.938, 0.943, 0.945, 0.945, 0.945, 0.945, 0.945, 0.945),
    **{name: (0.5,) * 13 for name in ("percentile","percentile_plain","percentile_expanded","bca_plain","bca_expanded","studentized","median_percentile","median_percentile_expanded","median_bca","median_bca_expanded")},
}


def attained_coverage(n: ArrayLike, level: float, method: str) -> NDArray[np.float64]:
    """What an interval of ``method`` at ``level`` covers with ``n`` units, at most ``level``; 0 below two units.

    Between the tabulated n, interpolated over 1 / n; above 200, over to ``level`` itself at infinity. For another level
    than .95 the tails are taken to be too heavy by the same factor (derived).
    """
    units = np.maximum(np.asarray(n, dtype=np.float64), 1)
    at = 1 / np.array([np.inf, *reversed(TABULATED_N)])
    covered = np.minimum([0.95, *reversed(COVERAGE[method])], 0.95)
    missed = 1 - np.interp(1 / units, at, covered)
    return np.where(units < 2, 0.0, 1 - np.minimum(missed * (1 - level) / 0.05, 1))
