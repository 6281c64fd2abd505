"""The page on recorded routing: its examples run, and it names every format and option there is."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from moe_interp.traces.readers.formats import READERS

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "traces.md").read_text(encoding="utf-8")


def test_the_examples_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        exec(code, names)
    printed = capsys.readouterr().out
    assert "RoutingTrace(7 tokens in 1 sequences, 2 layers, 8 experts, 2 slots, 2 routes not covered)" in printed
    assert "[False False]" in printed
    assert "(0, 1)" in printed


def test_the_page_names_every_format() -> None:
    for format, reader in READERS.items():
        assert f"| `{format}` |" in PAGE
        assert inspect.getdoc(reader)
