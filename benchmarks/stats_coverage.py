"""Levels and coverage of the statistics, by simulation.

Rewrites the tables between the marks of docs/stats-coverage.md that are named below, and nothing else.

python benchmarks/stats_coverage.py                 # the full study, about an hour on one core
python benchmarks/stats_coverage.py --runs 50       # a quick look, written to the terminal only
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_interp import stats

PAGE = Path(__file__).parents[1] / "docs" / "stats-coverage.md"
SIZES = (6, 10, 20, 50, 200)
Draw = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]
# every law has mean 0; the medians are 0, 0 and log 2 - 1
LAWS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, shape: rng.standard_normal(shape), 0.0),
    "t, 3 degrees of freedom": (lambda rng, shape: rng.standard_t(3, shape), 0.0),
    "exponential": (lambda rng, shape: rng.exponential(size=shape) - 1, float(np.log(2) - 1)),
}
LAYERS, EXPERTS = 32, 16


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def share(hits: NDArray[np.bool_]) -> str:
    return f"{np.mean(hits):.3f}"


def covers(interval: stats.Interval, truth: float) -> NDArray[np.bool_]:
    return (interval.low <= truth) & (truth <= interval.high)


def bootstrap_hits(law: str, n: int, method: str, expand: bool, runs: int) -> NDArray[np.bool_]:
    """Whether the interval of the mean covers 0; every batch of samples has resamples of its own."""
    rng = stats.derive_rng(0, "coverage", law, n)
    batches = []
    for batch in range(max(1, runs // 100)):
        x = LAWS[law][0](rng, (100, n))
        batches.append(covers(stats.bootstrap_interval(x, method=method, expand=expand, seed=batch), 0.0))
    return np.concatenate(batches)


def intervals_section(runs: int) -> str:
    methods = [("percentile", False), ("percentile", True), ("bca", False), ("bca", True), ("studentized", False)]
    rows = []
    for law, (draw, median) in LAWS.items():
        for n in SIZES:
            cells = [share(bootstrap_hits(law, n, method, expand, runs)) for method, expand in methods]
            x = draw(stats.derive_rng(0, "coverage", law, n), (runs, n))
            exact = stats.median_interval(x)
            cells.append(f"{share(covers(exact, median))} ({exact.attained[0]:.3f})")
            walsh = stats.pseudomedian_interval(x) if law != "exponential" else None
            cells.append(f"{share(covers(walsh, 0.0))} ({walsh.attained[0]:.3f})" if walsh else "n/a")
            rows.append([law, str(n), *cells])
    head = ["law", "n", "percentile, plain", "**percentile**", "BCa, plain", "BCa", "studentized"]
    head += ["median, exact (guaranteed)", "pseudomedian, exact (guaranteed)"]
    return table(head, rows)


def levels_section(runs: int) -> str:
    rows = []
    for n in (10, 12, 25, 26, 50):
        x = stats.derive_rng(1, "levels", n).standard_normal((runs * 10, n))
        rows.append([f"signed-rank, n = {n}, normal", share(stats.wilcoxon_signed_rank(x).p_value <= 0.05)])
    x = stats.derive_rng(2, "levels").standard_normal((runs * 10, 12))
    rows.append(["sign flips, n = 12, normal", share(stats.paired_permutation(x).p_value <= 0.05)])
    x = stats.derive_rng(3, "levels").standard_normal((runs * 10, 12))
    rows.append(["4 layers against 8", share(stats.two_group_permutation(x, np.arange(12) < 4).p_value <= 0.05)])
    a, b = stats.derive_rng(4, "levels").standard_normal((2, runs, 2, 4, 16))
    tests = [stats.mean_rho_permutation(*pair, n_permutations=399, seed=k) for k, pair in enumerate(zip(a, b))]
    rows.append(["mean rho, 2 domains x 4 layers", share(np.array([whole.p_value <= 0.05 for _, whole in tests]))])
    return table(["test", "share with p <= .05"], rows)


def calibration_run(run: int, reliability: float, planted: float, n: int, skewed: bool) -> tuple[float, ...]:
    """One data set: the error, whether the interval covers, its width, and whether it was called too noisy."""
    rng = stats.derive_rng(run, "calibration", str(reliability), str(planted), n)
    r = float(stats.latent_pearson(planted, EXPERTS))
    true_x, extra = rng.standard_normal((2, LAYERS, EXPERTS))
    true_y = r * true_x + np.sqrt(1 - r**2) * extra
    noise = np.sqrt(n * (1 - reliability) / reliability)
    x, y = (side + noise * rng.standard_normal((n, LAYERS, EXPERTS)) for side in (true_x, true_y))
    if skewed:  # probabilities: the items' noise is then larger at the larger expectations
        x = np.exp(0.5 * x)
        x /= x.sum(-1, keepdims=True)
    result = stats.corrected_correlation(x, y, n_resamples=60, n_permutations=9, seed=run)
    truth = float(stats.spearman(true_x, true_y).rho.mean())
    value, low, high = result.corrected.value, result.corrected.low, result.corrected.high
    reliable = result.reliability_x.value
    return value - truth, low <= truth <= high, high - low, result.too_noisy, reliable, value - planted


def calibration_row(design: tuple[float, float, int, bool], count: int, pool: ProcessPoolExecutor) -> list[str]:
    """One row of the table: ``count`` runs of (reliability, planted, items, skewed)."""
    one = partial(calibration_run, reliability=design[0], planted=design[1], n=design[2], skewed=design[3])
    out = np.array(list(pool.map(one, range(count), chunksize=10)), dtype=float)
    told = out[out[:, 3] == 0]
    cells = ["-"] * 4
    if len(told):
        cells = [
            f"{told[:, 0].mean():+.3f}",
            f"{told[:, 5].mean():+.3f}",
            share(told[:, 1]),
            f"{told[:, 2].mean():.2f}",
        ]
    name = f"{design[0]}" + (", routing skewed" if design[3] else "")
    return [name, f"{design[1]}", f"{design[2]}", f"{count}", *cells, f"{out[:, 4].mean():.2f}", share(out[:, 3])]


def calibration_section(runs: int, workers: int, done: Path | None) -> str:
    designs = [(rel, planted, 50, False) for rel in (0.5, 0.8) for planted in (0.0, 0.3, 0.6)]
    others = [(0.5, 0.3, 12, False), (0.8, 0.3, 12, False), (0.8, 0.6, 50, True), (0.15, 0.6, 50, False)]
    kept: dict[str, list[str]] = json.loads(done.read_text()) if done and done.exists() else {}
    with ProcessPoolExecutor(workers) as pool:
        for design in designs + others:
            count = runs if design in designs else max(10, runs // 5)
            key = f"{design} {count}"
            if key not in kept:
                kept[key] = calibration_row(design, count, pool)
                if done:
                    done.write_text(json.dumps(kept))
            print(kept[key], flush=True)
    rows = [kept[f"{design} {runs if design in designs else max(10, runs // 5)}"] for design in designs + others]
    head = ["reliability", "planted", "items", "runs", "bias", "bias against planted", "coverage", "mean width"]
    return table([*head, "mean reliability of x found", "too noisy"], rows)


SECTIONS = ("intervals", "levels", "corrected calibration")


def section(name: str, options: argparse.Namespace) -> str:
    if name == "intervals":
        return intervals_section(options.runs)
    if name == "levels":
        return levels_section(options.runs)
    return calibration_section(options.runs, options.workers, options.done)


def write_section(name: str, text: str) -> None:
    """Replace what is between the marks of ``name``, and nothing else."""
    start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    before, rest = PAGE.read_text().split(start)
    PAGE.write_text(before + start + text + end + rest.split(end)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--only", choices=SECTIONS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--done", type=Path, help="a file that keeps finished rows of the calibration study")
    options = parser.parse_args()
    for name in [options.only] if options.only else SECTIONS:
        text = section(name, options)
        print(name, text, sep="\n", flush=True)
        if options.runs >= 2000:
            write_section(name, text)


if __name__ == "__main__":
    main()
