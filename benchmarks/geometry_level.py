"""How often Mantel's test rejects where there is nothing, and how often intervals over sequences cover.

Run: python benchmarks/geometry_level.py [--runs 1000]

Tokens of a sequence are autoregressive: h_t = rho h_(t-1) + sqrt(1 - rho^2) noise, each with the stationary law. Routes
are those of a linear router on other states of the same kind, so they have the same dependence and nothing in common
with the states that they are compared with. "whole": sequences are permuted as blocks, as the package does. "one by
one": tokens are permuted singly, which is wrong wherever rho > 0.
"""

from __future__ import annotations

import argparse

import numpy as np

from moe_interp import stats
from moe_interp.stats.geometry.explained import explained_share

D, EXPERTS, K = 12, 12, 2


def states(rng: np.random.Generator, n: int, m: int, rho: float) -> np.ndarray:
    """``[sequence * token, d]``."""
    rows = [rng.normal(size=(n, D))]
    for _ in range(m - 1):
        rows.append(rho * rows[-1] + np.sqrt(1 - rho**2) * rng.normal(size=(n, D)))
    return np.stack(rows, axis=1).reshape(n * m, D)


def cosines(rows: np.ndarray) -> np.ndarray:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit @ unit.T


def overlaps(rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
    logits = rows @ rng.normal(size=(D, EXPERTS))
    sets = np.zeros(logits.shape)
    np.put_along_axis(sets, np.argsort(-logits, axis=1)[:, :K], 1.0, axis=1)
    return sets @ sets.T / K


def level(n: int, m: int, rho: float, runs: int, one_by_one: bool = False) -> float:
    rng = np.random.default_rng(0)
    rejected = 0
    for _ in range(0, runs, 50):
        x = np.stack([overlaps(rng, states(rng, n, m, rho)) for _ in range(50)])
        y = np.stack([cosines(states(rng, n, m, rho)) for _ in range(50)])
        found = stats.mantel(x, y, tokens_per_unit=1 if one_by_one else m, n_permutations=99)
        rejected += int((found.p_value <= 0.05).sum())
    return rejected / (50 * -(-runs // 50))


def coverage(n: int, m: int, rho: float, runs: int) -> tuple[float, float]:
    """How often the interval of the explained share, of independent routes, holds 0; and its mean half width."""
    rng = np.random.default_rng(1)
    unit = np.repeat(np.arange(n), m)
    first, second = np.triu_indices(n * m, 1)
    apart = unit[first] != unit[second]
    first, second = first[apart], second[apart]
    held, width = 0, 0.0
    for _ in range(runs):
        s, g = (overlaps(rng, states(rng, n, m, rho))[first, second] for _ in range(2))
        found = explained_share(s, g, unit[first], unit[second], n_units=n)
        held += bool(found.low <= 0 <= found.high)
        width += float(found.high - found.low) / 2 / runs
    return held / runs, width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    runs = parser.parse_args().runs
    print("| sequences | tokens each | rho | whole | one by one |\n|---|---|---|---|---|")
    for n, m, rho in ((5, 4, 0.9), (10, 1, 0.0), (10, 4, 0.0), (10, 4, 0.9), (20, 4, 0.9), (20, 4, 0.99)):
        whole = level(n, m, rho, runs)
        singly = level(n, m, rho, max(runs // 4, 50), one_by_one=True)
        print(f"| {n} | {m} | {rho} | {whole:.3f} | {singly:.3f} |", flush=True)
    print("\n| sequences | tokens each | rho | holds 0 | half width |\n|---|---|---|---|---|")
    for n, m, rho in ((6, 4, 0.9), (10, 4, 0.9), (20, 4, 0.9)):
        held, width = coverage(n, m, rho, runs)
        print(f"| {n} | {m} | {rho} | {held:.3f} | {width:.3f} |", flush=True)


if __name__ == "__main__":
    main()
