"""Figures of a result as files. Importable without torch, as recorded results are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from moe_interp.cli import console
from moe_interp.cli.words import in_options
from moe_interp.errors import DataError
from moe_interp.plots.figure import drawn_svg
from moe_interp.results.files import replacing


def write_figures(result: Any, figures: Mapping[str, Callable[[Any], Any]], folder: Path) -> None:
    """Write those figures that can be drawn as ``folder/<name>.svg``; what is missing is said."""
    for name, draw in figures.items():
        path = folder / f"{name}.svg"
        path.unlink(missing_ok=True)  # of an earlier run
        try:
            figure = drawn_svg(partial(draw, result), name)
        except DataError as error:  # what so few items or experts cannot bear; the page gives the same reason
            console.say(in_options(f"Without the figure {name}: {error}"))
        else:
            with replacing(path) as file:
                file.write(figure.encode())
