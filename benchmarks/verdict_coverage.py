"""What intervals for few units cover, and how often a verdict in words is false without an effect.

Rewrites the tables between the marks of docs/stats-coverage.md that are named below.

python benchmarks/verdict_coverage.py               # some minutes on one core
python benchmarks/verdict_coverage.py --runs 200    # a quick look, written to the terminal only
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_interp import stats
from moe_interp.stats.intervals.coverage import TABULATED_N

PAGE = Path(__file__).parents[1] / "docs" / "stats-coverage.md"
FULL = 4000
Array = NDArray[np.float64]
LAWS: dict[str, Callable[[np.random.Generator, tuple[int, int]], Array]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "exponential": lambda rng, shape: rng.exponential(size=shape) - 1,
    "log-normal": lambda rng, shape: rng.lognormal(size=shape) - np.exp(0.5),
}
SIZES: dict[str, Callable[[np.random.Generator, tuple[int, int]], Array]] = {
    "equal": lambda rng, shape: np.full(shape, 50.0),
    "log-normal, sd .5": lambda rng, shape: np.maximum(1, rng.lognormal(3.5, 0.5, shape).astype(int)).astype(float),
    "log-normal, sd 1": lambda rng, shape: np.maximum(1, rng.lognormal(3.5, 1.0, shape).astype(int)).astype(float),
    "1 or 100": lambda rng, shape: rng.choice([1.0, 100.0], shape),
    "one of 2000, others 20": lambda rng, shape: (
        np.where(np.arange(shape[0])[:, None] == 0, 2000.0, 20.0) + np.zeros(shape)
    ),
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def intervals(law: str, sizes: str | None, n: int, runs: int) -> stats.Interval:
    """Of a mean of 0 over ``n`` items, or of a ratio over clusters whose tokens share .3 of their variance."""
    rng = stats.derive_rng(n, "verdicts", law, str(sizes))
    values = LAWS[law](rng, (n, runs))
    if sizes is None:
        return stats.mean_interval(values, axis=0)
    size = SIZES[sizes](rng, (n, runs))
    totals = np.sqrt(0.3) * size * values + rng.standard_normal((n, runs)) * np.sqrt(0.7 * size)
    return stats.ratio_interval(totals, size)


def coverage_section(runs: int) -> str:
    rows = []
    for law in LAWS:
        for sizes in (None, *SIZES):
            hits = []
            for n in TABULATED_N:
                found = intervals(law, sizes, n, runs)
                hits.append(f"{np.mean((found.low <= 0) & (found.high >= 0)):.3f}")
            rows.append([law, "items" if sizes is None else f"clusters: {sizes}", *hits])
    return table(["law", "units", *(f"n = {n}" for n in TABULATED_N)], rows)


def false_section(runs: int) -> str:
    """The share of null data sets in which a word is said."""
    sizes_of_sample = [n for n in TABULATED_N if n >= stats.FEWEST_UNITS]
    rows = []
    for law in LAWS:
        for sizes in (None, "equal", "log-normal, sd .5", "log-normal, sd 1"):
            said = []
            for n in sizes_of_sample:
                found = intervals(law, sizes, n, runs)
                words = [stats.decide(low, high, n=n) for low, high in zip(found.low.tolist(), found.high.tolist())]
                said.append(f"{np.mean([word in ('above', 'below') for word in words]):.3f}")
            rows.append([law, "items" if sizes is None else f"clusters: {sizes}", *said])
    return table(["law", "units", *(f"n = {n}" for n in sizes_of_sample)], rows)


def groups_section(runs: int) -> str:
    rows = []
    for law in ("normal", "exponential"):
        for n_groups in (2, 4, 8):
            for spread in ("alike", "the smallest 4 times wider"):
                hits = []
                for smallest in (2, 4, 6, 10):
                    for factor in (1, 5):
                        rng = stats.derive_rng(smallest, "groups", law, n_groups, factor, spread)
                        sizes = [smallest, *[factor * smallest] * (n_groups - 1)]
                        parts = [LAWS[law](rng, (n, runs)) + g for g, n in enumerate(sizes)]
                        parts[0] = parts[0] * (1 if spread == "alike" else 4)
                        found, truth = stats.stratified_interval(parts), (n_groups - 1) / 2
                        hits.append(f"{np.mean((found.low <= truth) & (found.high >= truth)):.3f}")
                rows.append([law, str(n_groups), spread, *hits])
    head = [f"{smallest} and {factor * smallest}" for smallest in (2, 4, 6, 10) for factor in (1, 5)]
    return table(["law", "groups", "spread", *head], rows)


def layers_section(runs: int) -> str:
    """Two groups of layers that differ by chance alone: the test that takes layers as exchangeable, and the shifts."""
    rows = []
    for n_layers in (20, 24, 32, 48):
        early, late = max(1, round(0.19 * n_layers)), max(1, round(0.0625 * n_layers))
        outer = (np.arange(n_layers) < early) | (np.arange(n_layers) >= n_layers - late)
        for kind in ("independent", "autocorrelation .5", "autocorrelation .8", "random walk", "trend"):
            rng = stats.derive_rng(n_layers, "layers", kind)
            x = rng.standard_normal((runs // 4, n_layers))
            if kind.startswith("auto"):
                phi = float(kind.split()[1])
                for layer in range(1, n_layers):
                    x[:, layer] = phi * x[:, layer - 1] + np.sqrt(1 - phi**2) * x[:, layer]
            elif kind == "random walk":
                x = x.cumsum(1)
            elif kind == "trend":
                x = 0.3 * x + 2 * rng.standard_normal((len(x), 1)) * np.arange(n_layers) / n_layers
            shifted = stats.shifted_group_test(x, outer).p_value
            free = stats.two_group_permutation(x, outer, n_permutations=999).p_value
            rows.append([str(n_layers), kind, f"{np.mean(free <= 0.05):.3f}", f"{np.mean(shifted <= 0.05):.3f}"])
    return table(["layers", "impact over depth", "exchangeable", "**shifted**"], rows)


def shared_noise_section(runs: int) -> str:
    """Calibration of unrelated expectations: the verdict's rate by the test of the means and by crossed halves."""
    count = max(20, runs // 20)
    rows = []
    designs = [(0.5, 0.0, 16, False), (0.5, 0.95, 16, False), (0.8, 0.95, 16, False), (0.8, 0.95, 40, False)]
    for reliability, common, n, alike in [*designs, (0.8, 0.0, 16, True)]:
        hits = []
        for run in range(count):
            rng = stats.derive_rng(run, "shared", str(reliability), str(common), n)
            x, y = rng.standard_normal((2, 4, 16))
            if alike:
                x, y = (0.9 * rng.standard_normal(16) + 0.44 * side for side in (x, y))
            noise = rng.standard_normal((n, 4, 16))
            scale = np.sqrt(n * (1 - reliability) / reliability)
            sides = [
                side + scale * (np.sqrt(common) * noise + np.sqrt(1 - common) * rng.standard_normal(noise.shape))
                for side in (x, y)
            ]
            found = stats.corrected_correlation(*sides, n_resamples=40, n_permutations=199, seed=run)
            beyond = not found.too_noisy and (found.corrected.low > 0 or found.corrected.high < 0)
            hits.append((beyond and found.p_value <= 0.05, beyond and found.p_crossed <= 0.05))
        shares = [f"{share:.3f}" for share in np.mean(hits, axis=0)]
        rows.append([f"{reliability}", f"{common}", str(n), "yes" if alike else "no", *shares])
    head = ["reliability", "noise in common", "items", "layers alike", "by the means", "**by crossed halves**"]
    return table([*head[:4], *head[4:]], rows)


def few_items_section(runs: int) -> str:
    """``runs`` / 10 data sets a cell: what the interval of a corrected correlation covers, and when a word is said."""
    rows = []
    for law, reliability in (("normal", 0.8), ("normal", 0.95), ("exponential", 0.8), ("log-normal", 0.8)):
        for n in (8, 12):
            cells = [corrected_hits(law, reliability, n, planted, max(20, runs // 10)) for planted in (0.0, 0.6)]
            rows.append([law, f"{reliability}", str(n), *(f"{share:.3f}" for share in np.ravel(np.transpose(cells)))])
    head = ["noise", "reliability", "items", "covers, planted 0", "covers, planted .6"]
    return table([*head, "said, planted 0", "said, planted .6"], rows)


def corrected_hits(law: str, reliability: float, n: int, planted: float, count: int) -> Array:
    """Shares of data sets of 4 layers of 16 experts whose interval covers, and with a correlation in words."""
    r = float(stats.latent_pearson(planted, 16))
    sd = {"normal": 1.0, "exponential": 1.0, "log-normal": np.sqrt((np.e - 1) * np.e)}[law]
    scale = np.sqrt(n * (1 - reliability) / reliability) / sd
    hits = []
    for run in range(count):
        rng = stats.derive_rng(run, "few items", law, str(reliability), n, str(planted))
        x, extra = rng.standard_normal((2, 4, 16))
        y = r * x + np.sqrt(1 - r**2) * extra
        sides = [side + scale * LAWS[law](rng, (n, 64)).reshape(n, 4, 16) for side in (x, y)]
        found = stats.corrected_correlation(*sides, n_resamples=60, n_permutations=99, seed=run)
        truth = float(stats.spearman(x, y).rho.mean())
        covers = found.corrected.low <= truth <= found.corrected.high
        hits.append((covers, found.verdict.startswith(("positive", "negative"))))
    return np.asarray(np.mean(hits, axis=0))


def domains_section(runs: int) -> str:
    """``runs`` / 2 data sets a row, 199 permutations each."""
    designs: list[tuple[tuple[int, ...], float]] = [
        *(((n, n), spread) for n in (4, 6, 10, 40) for spread in (1.0, 4.0)),
        *(((n, 40), spread) for n in (4, 6, 10) for spread in (1.0, 4.0)),
        ((40, 10), 4.0),
        *(((10, 10, 10, 10), spread) for spread in (1.0, 4.0)),
    ]
    rows = [
        [law, ", ".join(map(str, sizes)), f"{spread:g}", "0", *hits]
        for law in ("normal", "exponential")
        for sizes, spread in designs
        for hits in [domain_hits(law, sizes, spread, 0.0, max(20, runs // 2))]
    ]
    for sizes in ((6, 6), (10, 40), (12, 12, 12, 12)):
        hits = domain_hits("normal", sizes, 1.0, 0.7, max(20, runs // 2))
        rows.append(["normal", ", ".join(map(str, sizes)), "1", ".7", *hits])
    head = ["law", "items per domain", "spread of the first", "effect", "**pairs**", "**global**", "too small"]
    return table([*head, "pairs, by the sum of squares", "global, by the sum of squares"], rows)


def domain_hits(law: str, sizes: tuple[int, ...], spread: float, effect: float, runs: int) -> list[str]:
    label = np.repeat(np.arange(len(sizes)), sizes)
    hits = []
    for run in range(runs):
        rng = stats.derive_rng(run, "domains", law, str(sizes), str(spread))
        delta = LAWS[law](rng, (len(label), 16)).reshape(-1, 2, 8)
        delta = delta * np.where(label == 0, spread, 1.0)[:, None, None]
        delta = delta + effect * rng.standard_normal((len(sizes), 2, 8))[label]
        found = stats.domain_effect(delta, label, n_permutations=199, seed=run)
        plain, whole = sum_of_squares_p(delta, label, 199, rng)
        hits.append(
            [
                (found.p_value <= 0.05).mean(),
                found.global_p <= 0.05,
                bool(found.too_few),
                (plain <= 0.05).mean(),
                whole <= 0.05,
            ]
        )
    return [f"{share:.3f}" for share in np.mean(hits, axis=0)]


def sum_of_squares_p(
    delta: Array, label: NDArray[np.int64], draws: int, rng: np.random.Generator
) -> tuple[Array, float]:
    """Permutation p of the plain sum of squares between domains, per cell and summed."""
    flat = (delta - delta.mean(-1, keepdims=True)).reshape(len(delta), -1)
    flat = flat - flat.mean(0)
    scaled = np.eye(label.max() + 1)[label] / np.sqrt(np.bincount(label))
    orders = np.stack([np.arange(len(flat)), *(rng.permutation(len(flat)) for _ in range(draws))])
    between = ((scaled[orders].transpose(0, 2, 1) @ flat) ** 2).sum(1)
    whole = between.sum(-1)
    return (between >= between[0] - 1e-9).mean(0), float((whole >= whole[0] - 1e-9).mean())


SECTIONS: dict[str, Callable[[int], str]] = {
    "few units": coverage_section,
    "false words": false_section,
    "groups": groups_section,
    "layers": layers_section,
    "shared noise": shared_noise_section,
    "domains": domains_section,
    "few items": few_items_section,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=FULL)
    parser.add_argument("--only", choices=tuple(SECTIONS))
    options = parser.parse_args()
    for name in [options.only] if options.only else SECTIONS:
        text = SECTIONS[name](options.runs)
        print(name, text, sep="\n", flush=True)
        if options.runs >= FULL:
            start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
            before, rest = PAGE.read_text().split(start)
            PAGE.write_text(before + start + text + end + rest.split(end)[1])


if __name__ == "__main__":
    main()
