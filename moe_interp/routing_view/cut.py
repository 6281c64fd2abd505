"""Which tokens of a long prompt are shown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_interp.routing_view.panel import Panel

MOST_ROWS = 200
LEAST_ROWS = 20


def rows_of(
    panels: Sequence[Panel], shown: Sequence[np.ndarray] | None, number: int, most: int
) -> tuple[np.ndarray, str]:
    """Indices of the tokens of a panel that are shown, and what is said of the others.

    Args:
        panels: All of the view.
        shown: Indices asked for, by panel; None for all.
        number: The panel.
        most: The most to show, at least ``LEAST_ROWS``.
    """
    n = len(panels[number].tokens)
    asked = np.arange(n) if shown is None else shown[number]
    rows = asked[: min(MOST_ROWS, max(LEAST_ROWS, most))]
    if len(rows) == n:
        return rows, ""
    if len(rows) == len(asked):
        return rows, f"{len(rows)} of {n} tokens are shown, those asked for."
    following = asked[len(rows) : 2 * len(rows)].tolist()
    start, stop = following[0], following[-1] + 1
    such_as = f"range({start}, {stop})" if following == list(range(start, stop)) else f"[{start}, ...]"
    return rows, (
        f"The first {len(rows)} of {len(asked)} tokens are shown: choose others by positions=, such as {such_as}; "
        "to_dataframe() has all."
    )
