"""On the command line, cells of another run are refused by the option that differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from moe_interp.cli.commands.runs import cell_folder
from moe_interp.errors import ResultError
from moe_interp.results.cells import CellStore


def planned(path: Path, *arguments: str) -> None:
    """A command with some options of the real ones, which opens a store and keeps one cell."""
    command = typer.Typer()

    @command.command()
    def run(context: typer.Context, first: int | None = None, routes: int = 32, items: list[str] | None = None) -> None:
        plan = {"items": {"count": first or 9, "checksum": str(first)}, "n_routes": routes}
        CellStore(cell_folder(context, path, "items"), plan).save({}, 0)

    CliRunner().invoke(command, list(arguments), catch_exceptions=False)


def test_the_option_that_differs_is_named(tmp_path: Path) -> None:
    planned(tmp_path, "--first", "60", "--items", "a.jsonl")
    planned(tmp_path, "--first", "60", "--items", "a.jsonl")
    for arguments, said in (
        (("--first", "20", "--items", "a.jsonl"), r"\(--first 60 there, 20 here\)"),
        (("--items", "a.jsonl"), r"\(--first 60 there, not given here\)"),
        (("--first", "60", "--items", "a.jsonl", "--routes", "16"), r"\(--routes 32 there, 16 here\)"),
    ):
        with pytest.raises(ResultError, match=f"cells of another run {said}"):
            planned(tmp_path, *arguments)
    options = json.loads((tmp_path / "plan.json").read_text())["options"]
    assert options == {"--first": ["items", 60], "--routes": ["n_routes", 32], "--items": ["items", ["a.jsonl"]]}
