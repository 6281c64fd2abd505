"""Tiny models score few branches: here too they share keys wherever that is exact."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def always_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branch, "_WORTH_A_TRIAL", 0)
