"""A page of results in one file that needs nothing else: chapters of words, figures, tables and the token view."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from moe_interp.errors import DataError
from moe_interp.plots.figure import drawn_svg
from moe_interp.report.html import environment, html_table
from moe_interp.results import Manifest, replacing


@dataclass(frozen=True)
class Section:
    """A part of a chapter.

    Attributes:
        title, text: Heading and the sentence under it.
        figure: An SVG element, or None.
        table: An HTML table, or None.
        problem: Why there is neither.
        view: Other HTML, such as the token view.
    """

    title: str
    text: str
    figure: Markup | None = None
    table: Markup | None = None
    problem: str | None = None
    view: Markup | None = None


@dataclass(frozen=True)
class Chapter:
    """What a page says of one result.

    Attributes:
        title: Heading.
        summary: The result in words.
        headlines: What was done, then the findings, a sentence each; the page begins with them.
        sections: Figures and tables.
        findings, findings_note: A table beside published numbers, and the sentence over it.
        manifest: Where the result comes from.
    """

    title: str
    summary: str
    sections: tuple[Section, ...]
    headlines: tuple[str, ...] = ()
    findings: Markup | None = None
    findings_note: str = ""
    manifest: Manifest | None = None


def render_page(
    chapters: Sequence[Chapter], *, title: str | None = None, model: str = "", extra: Mapping[str, str] | None = None
) -> str:
    """The whole page as text.

    Args:
        chapters: One a result, at least one.
        title: Of the page; the first chapter's by default.
        model: Name of the model.
        extra: Further lines of the section on the origin, such as the time each stage took.
    """
    return (
        environment()
        .get_template("page.html")
        .render(title=title or chapters[0].title, model=model, chapters=chapters, extra=dict(extra or {}))
    )


def write_page(path: str | Path, content: str) -> Path:
    """Write a page to ``path``, whole or not at all, and return the path.

    Raises:
        ResultError: The file cannot be written.
    """
    with replacing(path) as file:
        file.write(content.encode())
    return Path(path)


def prompt_chapter(view: str, title: str = "One prompt, token by token") -> Chapter:
    """The routing of one prompt.

    Args:
        view: Its HTML element, as a notebook shows it.
        title: Of the chapter.
    """
    said = "Which expert each token of a prompt is sent to, layer by layer; moe.show(text) shows it of any text."
    return Chapter(title, said, (Section("Which expert does each token go to?", "", view=Markup(view)),))


def section(
    name: str,
    title: str,
    text: str,
    draw: Callable[[], Figure] | None = None,
    tabulate: Callable[[], pd.DataFrame] | None = None,
) -> Section:
    """Draw and tabulate; a statistic that the data cannot bear becomes the reason why not."""
    try:
        figure = Markup(drawn_svg(draw, name)) if draw else None
        rows = tabulate() if tabulate else None
    except DataError as error:
        return Section(title, text, problem=str(error))
    if rows is None:
        return Section(title, text, figure)
    if rows.empty:
        return Section(title, text, figure, problem="None.")
    return Section(title, text, figure, html_table(rows))
