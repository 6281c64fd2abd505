"""What all pages share: the templates, and tables as HTML."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from pandas.api.types import is_numeric_dtype

LONGEST = 30  # rows shown of a long table
_SHORT = 24  # characters of a text that stays on one line, however narrow the page; longer ones get a wide column


def environment() -> Environment:
    """The templates; values are escaped, unknown names are errors."""
    return Environment(
        loader=PackageLoader("moe_interp.report"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def html_table(table: pd.DataFrame) -> Markup:
    """A table as HTML: numbers to three digits, truth as yes and no, at most ``LONGEST`` rows."""
    shown = table.head(LONGEST)
    template = environment().get_template("table.html")
    cells = [[(cell(value), _kind(value)) for value in row] for row in shown.itertuples(index=False)]
    columns = [(str(name).replace("_", " "), "number" if is_numeric_dtype(table[name]) else "") for name in table]
    return Markup(template.render(columns=columns, rows=cells, left_out=len(table) - len(shown)))


def _kind(value: Any) -> str:
    if isinstance(value, int | float):
        return "number"
    return "short" if len(str(value)) <= _SHORT else "long"


def with_intervals(table: pd.DataFrame) -> pd.DataFrame:
    """Each ``x``, ``x_low``, ``x_high`` as one column of text, ``x [low, high]``, on one line."""
    shown = table.copy()
    for name in [c for c in table if f"{c}_low" in table and f"{c}_high" in table]:
        bounds = zip(table[name], table[f"{name}_low"], table[f"{name}_high"])
        shown[name] = [_interval(*map(float, each)) for each in bounds]
        shown = shown.drop(columns=[f"{name}_low", f"{name}_high"]).rename(columns={name: f"{name} [95%]"})
    return shown


def _interval(value: float, low: float, high: float) -> str:
    shown, *bounds = ("–" if math.isnan(x) else f"{x:.3f}" for x in (value, low, high))
    return shown if math.isnan(low) else f"{shown} [{bounds[0]}, {bounds[1]}]".replace(" ", "\u00a0")


def cell(value: Any) -> str:
    """One value in words: three significant digits, a dash for what is missing."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.3g}"
    return str(value)
