"""What every subcommand prints with: results go to standard output, errors and progress to standard error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from moe_interp.cli.words import in_options

if TYPE_CHECKING:
    from rich.table import Table

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """A line to standard error, as it is: paths and users' texts may look like markup."""
    err.print(text, markup=False)


def fail(text: str, kind: str) -> None:
    """An error of a kind as one red text, so that it breaks between words; Python's arguments become options."""
    err.print(Text.assemble((f"{kind}: ", "bold red"), (in_options(text), "red")))


def show_warning(message: Warning | str, *place: Any, **more: Any) -> None:
    """In the place of ``warnings.showwarning``: the text alone, without the line of code that it arose at."""
    err.print(Text.assemble(("Warning: ", "bold yellow"), in_options(" ".join(str(message).split()))))


def summary(text: str, soft_wrap: bool = False) -> None:
    """A result's own words, as they are; with ``soft_wrap`` also its lines."""
    out.print(text, markup=False, soft_wrap=soft_wrap)


def point_to(page: Path, result: Path | None = None) -> None:
    """Where a run's page lies, and its result; paths stay on one line, to be copied."""
    out.print(Text.assemble("\nOpen ", (str(page), "bold"), " in a browser."), soft_wrap=True)
    if result is not None:
        out.print(f"The result is {result}.", markup=False, soft_wrap=True)


def quantity(n: int, noun: str, plural: str | None = None) -> str:
    """``1 route``, ``2 routes``."""
    return f"{n} {noun if n == 1 else plural or noun + 's'}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], wrap: Sequence[str] = ()) -> Table:
    """A rich table whose columns keep their words whole, but for those in ``wrap``."""
    from rich.table import Table  # most answers have none

    made = Table(title=title, title_justify="left", header_style="bold", pad_edge=False, box=None, padding=(0, 2, 0, 0))
    for name in columns:
        made.add_column(name, no_wrap=name not in wrap, overflow="fold")
    for row in rows:
        made.add_row(*map(str, row))
    return made
