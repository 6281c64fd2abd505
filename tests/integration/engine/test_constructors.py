"""Constructors run no forward pass: what runs the model is a function or a context manager that says so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

import moe_interp as mi
from moe_interp.hooks.attach import MoEHooks, attach
from tests import tiny

PACKAGE = str(Path(mi.__file__).parent)
TOKENS = tiny.random_tokens(2, 8)
ITEMS = [
    {"id": f"i{n}", "domain": "ab"[n % 2], "prompt": row[:5], "answer": row[5:]}
    for n, row in enumerate(TOKENS.tolist())
]


@pytest.fixture(scope="module")
def moe() -> MoEHooks:
    return attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe"))


@pytest.fixture
def constructors_that_run() -> Iterator[set[str]]:
    """The constructors of the package that were on the stack when a module ran."""
    found: set[str] = set()

    def note(module: Any, args: Any) -> None:
        frame = sys._getframe()
        while frame is not None:
            code = frame.f_code
            if code.co_name in ("__init__", "__post_init__") and code.co_filename.startswith(PACKAGE):
                found.add(f"{code.co_filename.removeprefix(PACKAGE)}: {code.co_qualname}")
            frame = frame.f_back  # type: ignore[assignment]

    handle = register_module_forward_pre_hook(note)
    yield found
    handle.remove()


def test_no_constructor_runs_a_module(moe: MoEHooks, constructors_that_run: set[str]) -> None:
    layer = moe.layers[0]
    moe.verify(TOKENS, layers=[layer])
    mi.isolate_experts(moe, ITEMS, layers=[layer], experts=[0], random_draws=1, progress=False)
    mi.counterfactual_routes(moe, TOKENS.tolist(), layers=[layer], n_routes=3, progress=False)
    routes = torch.tensor([0, 3]).expand(2, 8, 1, 2)
    mi.screen_routes(moe, TOKENS, [layer], {layer: routes}, audit=1)
    assert not constructors_that_run
    namespace: dict[str, Any] = {}
    exec(compile("class Runs:\n    def __init__(self, m, x): m(x)", f"{PACKAGE}/planted.py", "exec"), namespace)
    namespace["Runs"](moe.bridge, TOKENS)
    assert constructors_that_run == {"/planted.py: Runs.__init__"}
