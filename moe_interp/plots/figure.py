"""What all figures share: panels, colours, ticks, and writing them to files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from moe_interp.errors import ConfigError
from moe_interp.results import replacing

WIDTH = 9.0  # inches: 900 pixels at 100 dots per inch
FORMATS = ("svg", "png", "pdf")
# Okabe & Ito (2008), told apart with every kind of colour vision
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7f7f7f"


class ResultFigure(Figure):
    """A matplotlib Figure that a notebook shows as it is, without pyplot or a magic. At twice the screen's dots."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        width, height = (round(100 * inches) for inches in self.get_size_inches())
        return _bytes(self, "png", dpi=200), {"width": width, "height": height}


def panels(titles: Sequence[str], height: float, columns: int = 2, share: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure with one panel a title, ``height`` inches each, at most ``columns`` side by side."""
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    figure = ResultFigure(figsize=(WIDTH, height * rows + 0.3), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    axes = list(grid.ravel())
    for unused in axes[len(titles) :]:
        unused.set_axis_off()
    for axis, title in zip(axes, titles):
        axis.set_title(title, fontsize=10, loc="left")
        axis.tick_params(labelsize=8, labelbottom=True, labelleft=True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[: len(titles)]


def colour_bar(figure: Figure, image: Any, axes: Any, label: str, **options: Any) -> None:
    """A labelled bar of an image's colours beside its axes; ``options`` of ``Figure.colorbar``."""
    bar = figure.colorbar(image, ax=axes, **options)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def thin_ticks(labels: Sequence[str], most: int) -> tuple[list[int], list[str]]:
    """Positions and texts of at most ``most`` labels, evenly spaced from the first."""
    step = max(1, -(-len(labels) // most))
    places = list(range(0, len(labels), step))
    return places, [str(labels[place]) for place in places]


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure to a file; the ending says how: svg, png or pdf.

    Raises:
        ConfigError: Another ending.
        ResultError: The file cannot be written.
    """
    target = Path(path)
    kind = target.suffix.lstrip(".").lower()
    if kind not in FORMATS:
        raise ConfigError(f"{str(path)!r}", f"a file ending in {', '.join(FORMATS)}", "Rename the file.")
    content = to_svg(figure, target.stem).encode() if kind == "svg" else _bytes(figure, kind)
    with replacing(target) as file:
        file.write(content)
    return target


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element, to be put into a page as it is.

    Letters are drawn as outlines, so it looks the same everywhere. ``name`` goes before every id, so that several
    figures may share a page; the same figure and name give the same text.
    """
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        text = _svg_bytes(figure).decode()
    text = text[text.index("<svg") :]
    key = re.sub(r"\W+", "-", name)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r"url\(#", f"url(#{key}-", text)
    return re.sub(r'href="#', f'href="#{key}-', text)


def drawn_svg(draw: Callable[[], Figure], name: str) -> str:
    """:func:`to_svg` of what a function draws; for ``partial(draw, result)`` once a result, function and name."""
    if not isinstance(draw, partial) or len(draw.args) != 1 or draw.keywords:
        return to_svg(draw(), name)
    known = _DRAWN.setdefault(draw.args[0], {})
    if (draw.func, name) not in known:
        known[draw.func, name] = to_svg(draw(), name)
    return known[draw.func, name]


_DRAWN: WeakKeyDictionary[Any, dict[tuple[Callable[..., Figure], str], str]] = WeakKeyDictionary()


def _svg_bytes(figure: Figure) -> bytes:
    """As ``savefig`` writes it, which draws every figure twice: once for its layout alone."""
    buffer, canvas, dpi = io.BytesIO(), figure.canvas, figure.dpi
    # without a date, equal figures give equal files
    silent = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    try:
        FigureCanvasSVG(figure).print_svg(buffer, metadata=silent)
    finally:
        figure.set_canvas(canvas)
        figure.set_dpi(dpi)
    return buffer.getvalue()


def _bytes(figure: Figure, kind: str, dpi: int = 100) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=dpi)
    return buffer.getvalue()


def whiskers(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Lengths below and above ``values`` for ``Axes.errorbar``; none where a bound is missing or endless."""
    lengths = np.stack([values - low, high - values])
    return np.where(np.isfinite(lengths), np.maximum(lengths, 0), 0)
