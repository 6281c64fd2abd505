"""Figures and pages of a result, made by modules that know a plotting library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from moe_interp import RESULT_VIEWS
from moe_interp.errors import ConfigError


def draw(result: Any, kind: str, name: str | None, options: Mapping[str, Any]) -> Any:
    """The figure ``name`` of a result; the first of its kind's where None.

    Raises:
        ConfigError: No such figure.
    """
    figures = resolve_name(RESULT_VIEWS["figures"]).get(kind, {})
    if not figures:
        raise ConfigError(f"a result of kind {kind!r}", "a kind with figures", "Plot its to_dataframe().")
    if name is not None and name not in figures:
        raise ConfigError(f"figure {name!r}", f"one of {', '.join(figures)}", "Choose one of these.")
    return figures[name or next(iter(figures))](result, **options)


def write_report(result: Any, kind: str, path: str | Path) -> Path:
    """Write the page of a result of this kind to ``path``, or to ``index.html`` in the folder ``path``."""
    target = Path(path)
    written: Path = resolve_name(RESULT_VIEWS["report"])(
        result, kind, target / "index.html" if target.is_dir() else target
    )
    return written
