"""Tiny models score few branches: here too they share keys wherever that is exact."""

from __future__ import annotations

import pytest

from moe_interp.routes import branch_scores


@pytest.fixture(autouse=True)
def always_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branch_scores, "_WORTH_A_TRIAL", 0)
