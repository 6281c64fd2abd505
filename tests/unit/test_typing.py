"""A user's script under the type checkers that editors run: public names have their types, a wrong use is found."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """\
import torch
from transformer_lens.model_bridge import TransformerBridge
import moe_interp as mi

def run(bridge: TransformerBridge, logits: torch.Tensor) -> None:
    moe = mi.attach(bridge)
    name: str = moe.hook_name("router_logits", moe.layers[0])
    indices, weights = moe.spec(moe.layers[0]).rule.route(logits)
    result = mi.isolate_experts(moe, mi.load_items("items.jsonl"))
    text: str = result.summary()
    sampler = mi.GumbelTopK(tau=0.5)
    mean: float = float(mi.stats.mean_interval([1.0, 2.0]).estimate)
    trace: mi.RoutingTrace = mi.RoutingTrace.from_arrays([[[0, 1]]], n_experts=4)
"""
WRONG = """\
import moe_interp as mi

mi.atach
number: int = mi.load_items("items.jsonl")
mi.GumbelTopK(temperature=1.0)
mi.isolate_experts()
"""
# libraries whose types the script does not need: most of the files that mypy would read; pyright reads them all
MYPY_INI = """\
[mypy]
[mypy-torch.*,transformer_lens.*,transformers.*,wandb.*,huggingface_hub.*,matplotlib.*,rich.*,accelerate.*,datasets.*]
follow_imports = skip
"""


def run_checker(command: list[str], folder: Path) -> tuple[int, str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT), "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def checkers() -> list[object]:
    pyright = ["pyright", "--pythonpath", sys.executable]
    mypy = ["mypy", "--python-version", "3.11", "--ignore-missing-imports", "--follow-imports=silent"]
    mypy += ["--config-file", "mypy.ini", "--cache-dir", os.devnull]
    return [pytest.param(mypy, id="mypy"), pytest.param(pyright, id="pyright")]


@pytest.mark.parametrize("command", checkers())
def test_a_user_s_script(command: list[str], tmp_path: Path) -> None:
    if command[0] == "pyright" and shutil.which("node") is None:
        pytest.skip("pyright needs Node.js, which is not on this machine")
    (tmp_path / "right.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "wrong.py").write_text(WRONG, encoding="utf-8")
    (tmp_path / "mypy.ini").write_text(MYPY_INI, encoding="utf-8")
    status, said = run_checker([*command, "right.py", "wrong.py"], tmp_path)
    assert status == 1, said
    found = {(name, int(line)) for name, line in re.findall(r"(\w+)\.py:(\d+):.*error", said)}
    assert found == {("wrong", line) for line in (3, 4, 5, 6)}, said
