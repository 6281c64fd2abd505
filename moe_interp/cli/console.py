"""What every subcommand prints with: results go to standard output, errors and progress to standard error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], wrap: Sequence[str] = ()) -> Table:
    """A rich table whose columns keep their words whole, but for those in ``wrap``."""
    made = Table(title=title, title_justify="left", header_style="bold", pad_edge=False, box=None, padding=(0, 2, 0, 0))
    for name in columns:
        made.add_column(name, no_wrap=name not in wrap, overflow="fold")
    for row in rows:
        made.add_row(*map(str, row))
    return made
