"""Warnings as the command line shows them."""

from __future__ import annotations

import warnings

import pytest

from moe_interp.cli import console
from moe_interp.errors import warn
from moe_interp.experiments.inputs.repeats import RepeatedContentWarning


def test_a_warning_is_its_text_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = console.show_warning
        warn("2 items have [red]the content\n of another; raise memory_budget", RepeatedContentWarning)
    shown = capsys.readouterr().err
    assert shown == "Warning: 2 items have [red]the content of another; raise --memory\n"
