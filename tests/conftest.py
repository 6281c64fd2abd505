"""Fixtures that every folder of tests may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.tiny import FAMILIES

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores already

SHARED_DATA = Path(__file__).resolve().parents[1] / "../shared/data"


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """The name of one family after the other."""
    return str(request.param)


@pytest.fixture
def shared_data() -> Path:
    """The optional folder of real data beside the checkout; skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the optional data folder ../shared/data is absent")
    return SHARED_DATA.resolve()
