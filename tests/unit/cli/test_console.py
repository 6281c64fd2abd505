"""Warnings and progress as the command line shows them."""

from __future__ import annotations

import io
import warnings

import pytest

from moe_interp.cli import console, progress
from moe_interp.errors import warn
from moe_interp.experiments.repeats import RepeatedContentWarning


def test_a_warning_is_its_text_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = console.show_warning
        warn("2 items have [red]the content\n of another; raise memory_budget", RepeatedContentWarning)
    shown = capsys.readouterr().err
    assert shown == "Warning: 2 items have [red]the content of another; raise --memory\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("term", "draws"), [("xterm-256color", True), ("dumb", False), ("", True)])
def test_bars_are_for_terminals_that_can_draw_them(term: str, draws: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert not progress.on_terminal()
    monkeypatch.setattr("sys.stderr", Terminal())
    assert progress.on_terminal() is draws
    assert (progress.in_log("cells") is None) is draws


def test_a_log_gets_a_line_every_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    report = progress.LogLines("isolating experts", lambda: now)
    for done in range(11):  # ten seconds a cell
        now = 10.0 * done
        report(done, 10)
    said = ["isolating experts: 3 of 10 after 0:30 min", "isolating experts: 6 of 10 after 1:00 min"]
    assert capsys.readouterr().err.splitlines() == [*said, "isolating experts: 9 of 10 after 1:30 min"]
