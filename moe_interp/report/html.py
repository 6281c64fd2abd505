"""What all pages share: the templates, and tables as HTML."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

LONGEST = 30  # rows shown of a long table


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
    cells = [[(cell(value), isinstance(value, (int, float))) for value in row] for row in shown.itertuples(index=False)]
    left_out = len(table) - len(shown)
    return Markup(template.render(columns=[str(c).replace("_", " ") for c in table], rows=cells, left_out=left_out))


def with_intervals(table: pd.DataFrame) -> pd.DataFrame:
    """Each ``x``, ``x_low``, ``x_high`` as one column of text, ``x [low, high]``."""
    shown = table.copy()
    for name in [c for c in table if f"{c}_low" in table and f"{c}_high" in table]:
        bounds = zip(table[name], table[f"{name}_low"], table[f"{name}_high"])
        shown[name] = [f"{cell(v)} [{cell(low)}, {cell(high)}]" for v, low, high in bounds]
        shown = shown.drop(columns=[f"{name}_low", f"{name}_high"])
    return shown


def cell(value: Any) -> str:
    """One value in words: three significant digits, a dash for what is missing."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.3g}"
    return str(value)
