"""Figures and pages of a result: made by modules that know a plotting library, which are named here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from moe_interp.errors import ConfigError

# what makes them -> (module, its attribute), imported only when a figure or a page is asked for
MAKERS = {
    "figures": ("moe_interp.plots.figures", "FIGURES"),  # kind -> name -> function of a result
    "report": ("moe_interp.report.page_of", "write_result"),
}


def draw(result: Any, kind: str, name: str | None, options: Mapping[str, Any]) -> Any:
    """The figure ``name`` of a result; the first of its kind's where None.

    Raises:
        ConfigError: No such figure.
    """
    figures = _maker("figures").get(kind, {})
    if not figures:
        raise ConfigError(f"a result of kind {kind!r}", "a kind with figures", "Plot its to_dataframe().")
    if name is not None and name not in figures:
        raise ConfigError(f"figure {name!r}", f"one of {', '.join(figures)}", "Choose one of these.")
    return figures[name or next(iter(figures))](result, **options)


def write_report(result: Any, kind: str, path: str | Path) -> Path:
    """Write the page of a result of this kind to ``path``, or to ``index.html`` in the folder ``path``."""
    target = Path(path)
    written: Path = _maker("report")(result, kind, target / "index.html" if target.is_dir() else target)
    return written


def _maker(what: str) -> Any:
    module, name = MAKERS[what]
    return getattr(import_module(module), name)
