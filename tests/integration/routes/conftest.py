"""Tiny models score few branches: here too they share keys wherever that is exact. Tests share attached models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moe_interp.routes import branch_scores
from tests.integration.routes.helpers import changed_models


@pytest.fixture(autouse=True)
def always_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branch_scores, "_WORTH_A_TRIAL", 0)


@pytest.fixture(autouse=True, scope="module")
def shared_models_stay_as_they_were() -> Iterator[None]:
    yield
    assert not changed_models()
