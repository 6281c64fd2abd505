"""The README: its example runs, its commands and its file tree are true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moe_interp.arch.families import FAMILIES
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LOADING = 'TransformerBridge.boot_transformers("allenai/OLMoE-1B-7B-0924")'


def test_the_example_runs_on_a_tiny_model(capsys: Any) -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    assert LOADING in code
    names: dict[str, Any] = {"tiny_bridge": tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe", tiny.tiny_tokenizer())}
    exec(code.replace(LOADING, "tiny_bridge"), names)
    assert not (names["edited"] == names["forced"]).all()
    assert "65 of 65 checks passed" in capsys.readouterr().out
    assert not names["moe"].is_attached


def test_the_commands_are_single_lines_that_start_from_nothing() -> None:
    commands = [block.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S)]
    assert len(commands) == 2
    for command in commands:
        assert "\n" not in command
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt ")


def test_the_file_tree_names_every_folder_and_nothing_else() -> None:
    tree = re.findall(r"## Files\n\n```\n(.*?)```", README, re.S)[0]
    listed = set(re.findall(r"^  (\S+)", tree.split("tests/\n")[0], re.M))
    real = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "moe_interp").iterdir()}
    ignored = {"__pycache__/", "__init__.py", "py.typed"}
    assert listed - real == set()
    assert real - listed - ignored == set()
    assert f"all {len(FAMILIES)} supported families" in README


def test_every_example_says_how_to_run_it() -> None:
    for path in sorted((ROOT / "examples").glob("[0-9]*.py")):
        assert f"python examples/{path.name}" in path.read_text(encoding="utf-8")
