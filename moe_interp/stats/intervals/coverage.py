"""Tabulated coverage of the intervals at .95: what each really covers with n independent units."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

TABULATED_N = (2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100, 200)
# The least of the simulated laws and sizes (docs/stats-coverage.md and the benchmarks that write it): normal and
# exponential units, and for clusters sizes that are equal or log-normal with sd .5 and 1.
COVERAGE: dict[str, tuple[float, ...]] = {
    "small_sample": (0.95, 0.95, 0.95, 0.95, 0.945, 0.945, 0.945, 0.945, 0.942, 0.942, 0.945, 0.945, 0.945),
    "stratified": (0.83, 0.88, 0.905, 0.92, 0.93, 0.938, 0.943, 0.945, 0.945, 0.945, 0.945, 0.945, 0.945),
    "percentile": (0.95, 0.95, 0.95, 0.95, 0.945, 0.945, 0.945, 0.945, 0.945, 0.945, 0.945, 0.945, 0.945),
    "percentile_plain": (0.469, 0.702, 0.732, 0.805, 0.804, 0.831, 0.841, 0.894, 0.897, 0.927, 0.927, 0.936, 0.943),
    "percentile_expanded": (0.469, 0.704, 0.816, 0.879, 0.884, 0.879, 0.891, 0.924, 0.916, 0.935, 0.94, 0.94, 0.948),
    "bca_plain": (0.469, 0.685, 0.739, 0.815, 0.83, 0.849, 0.862, 0.907, 0.905, 0.93, 0.929, 0.937, 0.946),
    "bca_expanded": (0.469, 0.704, 0.815, 0.883, 0.889, 0.9, 0.9, 0.928, 0.923, 0.946, 0.94, 0.94, 0.947),
    "studentized": (0.95, 0.95, 0.944, 0.932, 0.927, 0.932, 0.935, 0.942, 0.943, 0.95, 0.947, 0.946, 0.948),
    "median_percentile": (0.479, 0.742, 0.872, 0.936, 0.926, 0.918, 0.929, 0.912, 0.932, 0.942, 0.94, 0.94, 0.945),
    "median_percentile_expanded": (
        0.479,
        0.742,
        0.872,
        0.936,
        0.95,
        0.95,
        0.95,
        0.95,
        0.949,
        0.95,
        0.949,
        0.944,
        0.945,
    ),
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
