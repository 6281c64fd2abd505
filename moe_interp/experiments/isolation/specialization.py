"""Which experts help or hurt a domain, and which help one domain more than another."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from moe_interp import stats
from moe_interp.errors import DataError
from moe_interp.experiments.isolation.data import (
    FloatArray,
    chosen,
    delta_array,
    items_by_domain,
    masses,
    members,
    quality_array,
    routed_axis,
    sign,
)

CELL = ["domain", "layer", "expert"]
COLUMNS = [*CELL, "n", "mean", "mean_low", "mean_high", "median", "ci_low", "ci_high", "p", "q", "direction"]
COLUMNS += ["rank_biserial", "unused", "out_of_reach"]
UNTESTABLE = "not testable"
BETWEEN = "differs between domains"
SAME = 1e-4


def specialization(
    data: xr.Dataset,
    baseline: str | None = "natural",
    mass: str | None = "one",
    alpha: float = 0.05,
    score: str = "mean",
    method: str = "bh",
    level: float = 0.95,
) -> pd.DataFrame:
    """One signed-rank test per (domain, layer, expert) over the domain's items, adjusted over all of them.

    delta = score with the expert forced (or ablated) - score under the baseline, nats per answer token; positive =
    better than the baseline.

    Args:
        baseline: ``"natural"`` | ``"uniform"`` | ``"random"``; the run's first where None.
        mass: ``"one"`` | ``"natural"``; the run's first where None.
        alpha: q <= alpha rejects.
        score: ``"mean"`` over the answer's tokens, or its ``"first"`` token.
        method: ``"bh"`` | ``"by"`` | ``"holm"``.
        level: Of both intervals.

    Returns:
        domain, layer, expert, n; mean with mean_low, mean_high (:func:`moe_interp.stats.mean_interval`, endless with
        one item); median with ci_low, ci_high (order statistics: exact at every n, endless below 6 items); p, q;
        direction ``"helped"`` | ``"hurt"`` | ``"none"`` | ``"not testable"`` (a domain whose smallest attainable p is
        above alpha, so one of fewer than 6 items; it is not counted among the tests); rank_biserial. Under ablation,
        unused: no token of the domain's items uses the experts; out_of_reach: some do, but none whose output can
        reach the answer (the last token's; in the last block, any before the answer's predictions). Both have deltas
        of exactly 0 and p = 1, and are counted. When experts are forced, both are False, but for deltas that are all 0
        (unused). Counts are in ``.attrs``.

    Raises:
        ConfigError: A baseline or mass that the run does not have, or options out of range.

    Source: Wilcoxon (1945), Pratt (1959), Benjamini & Hochberg (1995); the design is that of the Phi-mini-MoE study.
    The test's null is that deltas are symmetric about 0: helped and hurt are said of most items, not of the mean, which
    a few large deltas may turn. It does not show specialization **between** domains: see :func:`domain_effect_table`.
    """
    baseline, mass = chosen(data, "baseline", baseline), chosen(data, "mass", mass)
    table = _tests(data, delta_array(data, mass, baseline, score), level)
    floors = table["n"].map({n: stats.smallest_attainable_p(n) for n in set(table["n"])})
    testable = floors <= alpha
    q = stats.adjust_p(table["p"].where(testable), method=method)
    found = stats.rejected(q, alpha)
    words = np.select(
        [~testable, found & (table["rank_biserial"] > 0), found & (table["rank_biserial"] < 0)],
        [UNTESTABLE, "helped", "hurt"],
        "none",
    )
    table["q"], table["direction"] = q, words
    table = table[COLUMNS]
    table.attrs = {
        "baseline": baseline,
        "mass": mass,
        "score": score,
        "alpha": alpha,
        "method": method,
        "n_tests": int(testable.sum()),
        "helped": int((words == "helped").sum()),
        "hurt": int((words == "hurt").sum()),
        "unused": int(table["unused"].sum()),
        "out_of_reach": int(table["out_of_reach"].sum()),
        "smallest_p": float(floors.min()),
    }
    return table


def _tests(data: xr.Dataset, delta: FloatArray, level: float) -> pd.DataFrame:
    """One row per (domain, layer, expert): the columns that need that row's items only."""
    layers, experts = data["layer"].values, data["expert"].values
    used, reached = _use(data)
    frames = []
    for domain, index in items_by_domain(data).items():
        rows = delta[index]
        is_zero = (rows == 0).all(0)
        is_used = np.zeros_like(is_zero) if used is None else used[index].any(0)
        test = stats.wilcoxon_signed_rank(rows, axis=0)
        median = stats.median_interval(rows, axis=0, level=level)
        mean = stats.mean_interval(rows, axis=0, level=level)
        endless = np.full(median.low.shape, np.inf)
        columns = {
            "n": test.n,
            "mean": mean.estimate,
            "mean_low": mean.low if len(rows) > 1 else -endless,
            "mean_high": mean.high if len(rows) > 1 else endless,
            "median": median.estimate,
            "ci_low": median.low,
            "ci_high": median.high,
            "p": test.p_value,
            "rank_biserial": test.effect,
            "unused": is_zero & ~is_used,
            "out_of_reach": is_zero & is_used & ~(is_used if reached is None else reached[index].any(0)),
        }
        labels = {"domain": domain, "layer": np.repeat(layers, len(experts)), "expert": np.tile(experts, len(layers))}
        frames.append(pd.DataFrame(labels | {name: value.ravel() for name, value in columns.items()}))
    return pd.concat(frames, ignore_index=True)


def _use(data: xr.Dataset) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
    """Whether an item's tokens use a set of ablated experts, and where they could reach the answer, ``[item, layer,
    set]``; None where experts were forced, or where a run does not say."""
    if sign(data) > 0 or "uses_item" not in data:
        return None, None
    axis = routed_axis(data)
    ids = [[data[axis].values.tolist().index(e) for e in members(label)] for label in data["expert"].values]
    both = (data[name].transpose("item", "layer", axis).values for name in ("uses_item", "reaches_item"))
    used, reached = (np.stack([values[..., chosen].any(-1) for chosen in ids], axis=-1) for values in both)
    return used.astype(bool), reached.astype(bool)


def mass_agreement(
    data: xr.Dataset, baseline: str | None = "natural", alpha: float = 0.05, score: str = "mean", method: str = "bh"
) -> pd.DataFrame:
    """Where the two masses lead to different conclusions.

    Under ``"one"`` a forced expert has weight 1, under ``"natural"`` the token's own sum of weights: the first also
    changes how much the layer adds to the residual stream. Each mass is a family of tests of its own.

    Returns:
        domain, layer, expert; mean_<mass> (nats) and direction_<mass> for both; agree. ``.attrs``: counts, and whether
        the masses are the same number to a part in ten thousand, as where a token's weights sum to one anyway.

    Raises:
        DataError: The run has one mass only.

    Source: derived.
    """
    if len(masses(data)) < 2:
        raise DataError(f"mass {masses(data)[0]!r} only", "two masses", "Run isolate_experts(mass=('one', 'natural')).")
    tables = {mass: specialization(data, baseline, mass, alpha, score, method) for mass in masses(data)}
    first, *_ = tables.values()
    table = first[CELL].copy()
    for mass, one in tables.items():
        table[f"mean_{mass}"], table[f"direction_{mass}"] = one["mean"], one["direction"]
    words = table[[f"direction_{mass}" for mass in tables]]
    table["agree"] = words.nunique(axis=1) == 1
    opposite = words.isin(["helped"]).any(axis=1) & words.isin(["hurt"]).any(axis=1)
    means = table[[f"mean_{mass}" for mass in tables]].to_numpy()
    same = bool(np.ptp(means, axis=1).max() <= SAME * np.abs(means).max())
    table.attrs = {"agree": int(table["agree"].sum()), "n": len(table), "opposite": int(opposite.sum()), "same": same}
    return table


def domain_effect_table(
    data: xr.Dataset, mass: str | None = "one", alpha: float = 0.05, n_permutations: int = 9999, seed: int = 0
) -> pd.DataFrame:
    """Specialization **between** domains: does an expert help some domains more than others?

    delta is centred per item over experts, so that a domain that is more fragile as a whole does not pass for
    specialization; that also removes the baseline. Statistic, permutation of the items' labels and adjustment:
    :func:`moe_interp.stats.domain_effect`.

    Returns:
        layer, expert, statistic (Welch's F), eta_squared, p, q, significant, best_domain, contrast_<domain> (nats; that
        domain's mean of centred delta minus the mean over all items; negative deltas are worse, also under ablation),
        and verdict. ``.attrs``: global_p over all layers and experts, n_permutations, and too_few, the domains with too
        few items for a verdict; nothing is significant then.

    Raises:
        DataError: One domain only, a domain of a single item, or a single forced expert (nothing to compare with).

    Source: derived. Domains are those of the items; what else differs between them (length, difficulty) is included.
    """
    groups = items_by_domain(data)
    if len(groups) < 2:
        raise DataError(
            f"the single domain {next(iter(groups))!r}",
            "items of at least two domains, as this compares domains with each other",
            "Add items of another domain; specialization() and calibration() work with one.",
        )
    if data.sizes["expert"] < 2:
        raise DataError("a single forced expert", "at least two", "Run isolate_experts on more experts.")
    mass = chosen(data, "mass", mass)
    centred = sign(data) * quality_array(data, mass)
    labels = data["domain"].values.astype(str)
    result = stats.domain_effect(centred, labels, n_permutations=n_permutations, seed=seed)
    layers, experts = data["layer"].values, data["expert"].values
    words = _between_words(result, alpha)
    columns = {
        "layer": np.repeat(layers, len(experts)),
        "expert": np.tile(experts, len(layers)),
        "statistic": result.statistic.ravel(),
        "eta_squared": result.eta_squared.ravel(),
        "p": result.p_value.ravel(),
        "q": result.q_value.ravel(),
        "significant": [word == BETWEEN for word in words],
        "best_domain": np.array(result.domains)[(sign(data) * result.contrast).argmax(0)].ravel(),
    }
    columns |= {f"contrast_{name}": part.ravel() for name, part in zip(result.domains, result.contrast)}
    table = pd.DataFrame(columns | {"verdict": words})
    table.attrs = {"global_p": result.global_p, "n_permutations": n_permutations, "mass": mass, "alpha": alpha}
    table.attrs["too_few"] = list(result.too_few)
    return table


def _between_words(result: stats.DomainEffect, alpha: float) -> list[str]:
    """A verdict per (layer, expert). A test has no interval: the statistic stands for both bounds, and q decides."""
    n = min(size for name, size in zip(result.domains, result.n_items) if name in (result.too_few or result.domains))
    held = 0.0 if result.too_few else 1.0
    return [
        f"{UNTESTABLE}: no spread in a domain"
        if np.isnan(q)
        else stats.verdict(f, f, n=n, words=(BETWEEN, BETWEEN), coverage=held, p=q, alpha=alpha)
        for f, q in zip(np.nan_to_num(result.statistic).ravel().tolist(), result.q_value.ravel().tolist())
    ]
