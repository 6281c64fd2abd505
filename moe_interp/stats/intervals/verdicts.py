"""Every verdict in words: what an interval allows to be said, and when there are too few units to say anything."""

from __future__ import annotations

from typing import Literal

import numpy as np

from moe_interp.stats.checks import check_probability
from moe_interp.stats.intervals.coverage import attained_coverage
from moe_interp.stats.significance.multiple import rejected

Decision = Literal["above", "below", "within", "open", "too few"]
FEWEST_UNITS = 6
COVERS = 0.93


def decide(
    low: float,
    high: float,
    *,
    n: int,
    coverage: float | None = None,
    null: float = 0.0,
    margin: float | None = None,
    p: float | None = None,
    alpha: float = 0.05,
) -> Decision:
    """What an interval at .95 says of ``null``. Every verdict in words comes from here.

    ``"too few"``: fewer than 6 independent units, a coverage below .93, or bounds that are missing. (With 5 units the
    smallest two-sided p of sign flips is 2 / 2^5 > .05: any verdict would rest on the shape of the law, which so few
    units do not show.) ``"within"``: the whole interval is no further than ``margin`` from ``null``, whether or not it
    holds it. ``"above"`` | ``"below"``: the whole interval is on one side of ``null``; where ``p`` is given, and p <=
    ``alpha`` besides. ``"open"``: anything else, which is not evidence of no difference.

    Args:
        low, high: The interval's bounds, in any unit.
        n: Independent units behind it: items, sequences, seeds; not tokens of one sequence.
        coverage: What the interval covers at this n (``Interval.attained``); that of
            :func:`moe_interp.stats.cluster_interval` by default.
        null: The value that means no difference.
        margin: How far from ``null`` is still negligible.
        p: Of a test of the same null, where one was made; NaN where it could not be. For a test without an interval,
            pass its statistic as both bounds.

    Source: derived; what each verdict is wrong about, and how often, is tabulated in docs/stats-coverage.md.
    """
    check_probability(alpha, "alpha")
    covered = float(attained_coverage(np.asarray(n), 0.95, "small_sample")) if coverage is None else coverage
    is_missing = np.isnan(low) or np.isnan(high) or np.isnan(covered) or (p is not None and np.isnan(p))
    if n < FEWEST_UNITS or is_missing or covered < COVERS:
        return "too few"
    if margin is not None and max(null - low, high - null) <= margin:
        return "within"
    if (low <= null <= high) or (p is not None and not rejected(p, alpha)):
        return "open"
    return "above" if low > null else "below"


def verdict(
    low: float,
    high: float,
    *,
    n: int,
    words: tuple[str, str] = ("larger", "smaller"),
    undecided: str = "no difference shown",
    negligible: str = "no difference that matters",
    units: str = "items",
    coverage: float | None = None,
    null: float = 0.0,
    margin: float | None = None,
    p: float | None = None,
    alpha: float = 0.05,
) -> str:
    """:func:`decide` in the caller's words.

    Args:
        words: For an interval above and below ``null``.
        undecided: Where the interval holds ``null``.
        negligible: Where the interval is within ``margin``.
        units: What ``n`` counts, in the plural: "too few items to say (n = 3)".
    """
    found = decide(low, high, n=n, coverage=coverage, null=null, margin=margin, p=p, alpha=alpha)
    said = {"above": words[0], "below": words[1], "within": negligible, "open": undecided}
    return said.get(found, f"too few {units} to say (n = {n})")
