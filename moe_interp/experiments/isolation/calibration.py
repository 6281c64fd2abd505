"""Router calibration: do the experts that the router prefers serve the domain better?

Every number here is a rank correlation over the experts of a layer between natural routing and quality: delta when
experts are forced, -delta when they are ablated. Positive = the router prefers the better experts. The baseline that
delta was taken against is the same for all experts of an item, so it drops out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats as scipy_stats

from moe_interp import stats
from moe_interp.errors import DataError
from moe_interp.experiments.isolation.data import (
    FloatArray,
    chosen,
    items_by_domain,
    pooled_name,
    quality_array,
    routing_array,
)

ALL = "all domains"
MIN_ITEMS, MIN_EXPERTS = 8, 4  # what a split-half correction needs
Pair = tuple[FloatArray, FloatArray]  # routing and quality of a domain, [item, layer, expert]


def calibration_table(data: xr.Dataset, mass: str | None = "one", method: str = "bh") -> pd.DataFrame:
    """Spearman's rho over experts between mean routing and mean quality, per domain and layer.

    Returns:
        domain, layer, n_items, n_experts; rho with p and q (routing probability over all positions 0..T-2); rho_share
        (slot shares instead); rho_prompt and rho_answer (probability over the prompt, and over the positions that
        predict the answer), where the run has them. NaN where all experts are equal.

    Raises:
        DataError: Fewer than 3 experts.
        ConfigError: A mass that the run does not have.

    Source: the Phi-mini-MoE study. One layer says little: with 16 experts p < .05 needs abs(rho) >= .50; and a rho near
    zero may be noise in the means, see :func:`calibration_by_domain`.
    """
    _check_experts(data)
    quality, groups = quality_array(data, mass), items_by_domain(data)
    known = [str(p) for p in data["positions"].values]
    main = "all" if "all" in known else known[0]
    columns = {"rho": (main, "probability"), "rho_share": (main, "share")}
    columns |= {f"rho_{name}": (name, "probability") for name in known if name != main}
    routing = {name: routing_array(data, *what) for name, what in columns.items()}
    frames = []
    for domain, index in groups.items():
        mean = quality[index].mean(0)
        tests = {name: stats.spearman(_mean(array[index]), mean) for name, array in routing.items()}
        frame = {
            "domain": domain,
            "layer": data["layer"].values,
            "n_items": len(index),
            "n_experts": mean.shape[-1],
            "rho": tests["rho"].rho,
            "p": tests["rho"].p_value,
        }
        frames.append(pd.DataFrame(frame | {name: test.rho for name, test in tests.items() if name != "rho"}))
    table = pd.concat(frames, ignore_index=True)
    table["q"] = stats.adjust_p(table["p"], method=method)
    leading = ["domain", "layer", "n_items", "n_experts", "rho", "p", "q"]
    return table[leading + [name for name in table if name not in leading]]


def calibration_by_domain(
    data: xr.Dataset,
    mass: str | None = "one",
    positions: str | None = "all",
    level: float = 0.95,
    n_permutations: int = 4999,
    n_resamples: int = 120,
    seed: int = 0,
) -> pd.DataFrame:
    """Calibration averaged over layers, one row per domain and one for all domains (of at least 8 items, where there
    are two such).

    Returns:
        domain, n_items, n_layers;

        - rho, low, high: Fisher-z mean over layers; items are resampled within a domain, through all layers at once,
          and the interval is z +- t sd(z*): percentiles would lean to zero, as a resample is noisier than the data.
        - p: expert labels permuted within a layer, the same way in all domains. Noise that routing and quality share in
          an item makes it small without any correlation of the expectations.
        - p_crossed: of correlations between different halves of the items, which such noise does not move, experts
          permuted one way for all layers (:func:`moe_interp.stats.corrected_correlation`); the verdict's p.
        - analytic_low, analytic_high: of the Fisher-z mean if layers were independent, which they are not.
        - reliability_routing, reliability_quality, each with its lower bound ``_low``; corrected, corrected_low,
          corrected_high; too_noisy: :func:`moe_interp.stats.corrected_correlation`; verdict in words, a correlation
          only where p_crossed agrees. Corrected is NaN where it
          is too noisy to tell, or where there are too few items (8) or experts (4).

    Raises:
        DataError: Fewer than 3 experts.

    Source: the Phi-mini-MoE study for rho; the rest is derived. All of it is about these layers and experts: the items
    are the sample.
    """
    _check_experts(data)
    routing, quality = routing_array(data, chosen(data, "positions", positions)), quality_array(data, mass)
    groups = items_by_domain(data)
    pairs = {d: (routing[index], quality[index]) for d, index in groups.items()}
    x, y = (np.stack([_mean(pair[side]) for pair in pairs.values()]) for side in (0, 1))
    each, _ = stats.mean_rho_permutation(x, y, n_permutations=n_permutations, seed=seed)
    rho = stats.spearman(x, y).rho  # [domain, layer]
    rows = []
    for index, (domain, pair) in enumerate(pairs.items()):
        permuted = (float(each.statistic[index]), float(each.p_value[index]))
        rows.append(_domain_row(domain, [pair], rho[index], permuted, level, n_resamples, seed))
    if len(pairs) > 1:
        sizes = np.array([len(pair[0]) for pair in pairs.values()])
        # a domain too small for the correction would take it away from all
        kept = sizes >= MIN_ITEMS if (sizes >= MIN_ITEMS).sum() > 1 else sizes > 0
        _, whole = stats.mean_rho_permutation(x[kept], y[kept], n_permutations=n_permutations, seed=seed)
        permuted = (float(whole.statistic), float(whole.p_value))
        pooled = [pair for pair, keep in zip(pairs.values(), kept) if keep]
        rows.append(_domain_row(pooled_name(pairs, ALL), pooled, rho[kept], permuted, level, n_resamples, seed))
        if left_out := [domain for domain, keep in zip(pairs, kept) if not keep]:
            rows[-1]["verdict"] = f"{rows[-1]['verdict']} (without {', '.join(left_out)}: fewer than {MIN_ITEMS} items)"
    return pd.DataFrame(rows)


def calibration_points(data: xr.Dataset, mass: str | None = "one", positions: str | None = "all") -> pd.DataFrame:
    """The pairs behind the correlations.

    Returns:
        domain, layer, expert; routing (mean probability over the domain's items); quality (mean over items, nats,
        centred over the experts of a layer).
    """
    routing, quality = routing_array(data, chosen(data, "positions", positions)), quality_array(data, mass)
    layers, experts = data["layer"].values, data["expert"].values
    frames = []
    for domain, index in items_by_domain(data).items():
        labels = {"domain": domain, "layer": np.repeat(layers, len(experts)), "expert": np.tile(experts, len(layers))}
        values = {"routing": _mean(routing[index]).ravel(), "quality": quality[index].mean(0).ravel()}
        frames.append(pd.DataFrame(labels | values))
    return pd.concat(frames, ignore_index=True)


def _domain_row(
    name: str,
    pairs: list[Pair],
    rho: FloatArray,
    permuted: tuple[float, float],
    level: float,
    n_resamples: int,
    seed: int,
) -> dict[str, object]:
    low, high = item_interval(pairs, level, n_resamples, seed)
    n_experts, n_layers = pairs[0][0].shape[-1], rho.shape[-1]
    row: dict[str, object] = {
        "domain": name,
        "n_items": sum(len(x) for x, _ in pairs),
        "n_layers": n_layers,
        "rho": permuted[0],
        "low": low,
        "high": high,
        "p": permuted[1],
        "analytic_low": np.nan,
        "analytic_high": np.nan,
    }
    if n_experts >= MIN_EXPERTS and not np.isnan(rho).all():
        analytic = stats.fisher_z_interval(rho.ravel(), n_experts, level=level)
        row |= {"analytic_low": float(analytic.low), "analytic_high": float(analytic.high)}
    row |= _corrected(pairs, level, n_resamples, seed)
    if row["too_noisy"] and max(permuted[1], float(str(row["p_crossed"]))) <= 1 - level:
        way = "positive" if permuted[0] > 0 else "negative"
        row["verdict"] = f"{row['verdict']}; the uncorrected correlation is {way} all the same"
    return row


def _corrected(pairs: list[Pair], level: float, n_resamples: int, seed: int) -> dict[str, object]:
    """The columns of the correction, and the verdict in words; NaN with the reason where it cannot be had."""
    names = ["reliability_routing", "reliability_quality"]
    columns = (*names, *(f"{name}_low" for name in names), "corrected", "corrected_low", "corrected_high")
    columns += ("p_crossed",)
    empty: dict[str, object] = dict.fromkeys(columns, np.nan)
    n_items, n_experts = min(len(x) for x, _ in pairs), pairs[0][0].shape[-1]
    if n_items < MIN_ITEMS or n_experts < MIN_EXPERTS:
        reason = f"{n_items} items and {n_experts} experts, and at least {MIN_ITEMS} and {MIN_EXPERTS} are needed"
        return empty | {"too_noisy": True, "verdict": f"too noisy to tell: {reason}"}
    try:
        result = stats.corrected_correlation(
            [x for x, _ in pairs], [y for _, y in pairs], level=level, n_resamples=max(20, n_resamples), seed=seed
        )
    except DataError as error:
        return empty | {"too_noisy": True, "verdict": f"not testable: {error.given}"}
    found: dict[str, object] = {}
    for name, reliability in zip(names, (result.reliability_x, result.reliability_y)):
        found |= {name: reliability.value, f"{name}_low": reliability.low}
    found |= dict(zip(("corrected", "corrected_low", "corrected_high"), vars(result.corrected).values()))
    found["p_crossed"] = result.p_crossed
    return found | {
        "too_noisy": result.too_noisy,
        "verdict": _verdict(result, min(map(len, (x for x, _ in pairs))), level),
    }


def _verdict(result: stats.CorrectedCorrelation, n_items: int, level: float) -> str:
    """Noise comes first. Then chance: the interval is about other items, so experts that were matched to the router at
    random keep the correlation they happen to have, and only the permutation of experts knows that."""
    if result.too_noisy:
        x, y = result.reliability_x, result.reliability_y
        return (
            f"too noisy to tell: reliability of routing {x.value:.2f} (lower bound {x.low:.2f}), "
            f"of quality {y.value:.2f} (lower bound {y.low:.2f})"
        )
    c, p = result.corrected, result.p_crossed
    text = f"{c.value:.2f}, 95% interval {c.low:.2f} to {c.high:.2f}"
    if p > 1 - level:
        return f"no correlation beyond chance (p = {p:.2g}): {text}"
    words = ("positive correlation", "negative correlation")
    kind = stats.verdict(
        c.low,
        c.high,
        n=n_items,
        words=words,
        undecided="no clear correlation",
        coverage=stats.CORRECTED_COVERS,
        p=p,
        alpha=1 - level,
    )
    return f"{kind}: {text}"


def item_interval(
    pairs: Sequence[Pair], level: float = 0.95, n_resamples: int = 120, seed: int = 0
) -> tuple[float, float]:
    """Interval of the Fisher-z mean of rho over domains and layers, items resampled within each domain.

    Args:
        pairs: Routing and quality per domain, ``[item, layer, expert]``.

    Returns:
        tanh(z +- t sd(z*)), t with (items of the smallest domain - 1) degrees of freedom; NaN with a single item or
        without any layer in which experts differ.

    Source: derived.
    """
    n_min = min(len(x) for x, _ in pairs)
    if n_min < 2:
        return float("nan"), float("nan")
    drawn, seen = [], []
    for index, pair in enumerate(pairs):
        n = len(pair[0])
        rng = stats.derive_rng(seed, "item_interval", index)
        weights = rng.multinomial(n, np.full(n, 1 / n), size=max(20, n_resamples)) / n
        # [resample, layer, expert]
        x, y = (np.tensordot(weights, side, axes=1) for side in pair)
        drawn.append(stats.spearman(x, y).rho)
        seen.append(stats.spearman(_mean(pair[0]), _mean(pair[1])).rho)
    z = np.arctanh(stats.fisher_z_mean(np.concatenate(drawn, axis=-1)))
    centre = np.arctanh(stats.fisher_z_mean(np.concatenate(seen)))
    half = scipy_stats.t.ppf((1 + level) / 2, n_min - 1) * np.nanstd(z, ddof=1) if not np.isnan(centre) else np.nan
    return float(np.tanh(centre - half)), float(np.tanh(centre + half))


def _mean(rows: FloatArray) -> FloatArray:
    """Mean over items; positions that an item does not have are left out, and NaN where none has them."""
    known = ~np.isnan(rows)
    counts = known.sum(0)
    return np.where(counts > 0, np.where(known, rows, 0).sum(0) / np.maximum(counts, 1), np.nan)


def _check_experts(data: xr.Dataset) -> None:
    if data.sizes["expert"] < 3:
        raise DataError(f"{data.sizes['expert']} experts", "at least 3 to rank", "Run isolate_experts on more experts.")
