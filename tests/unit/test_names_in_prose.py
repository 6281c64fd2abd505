"""Names in the README, the docs and the docstrings are names that there are."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import moe_interp as mi

ROOT = Path(__file__).resolve().parents[2]
# __main__ runs the command line when it is imported
FILES = [path for path in sorted((ROOT / "moe_interp").rglob("*.py")) if path.stem != "__main__"]
PROSE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.py")), *FILES]
# a dotted name of the package, not a part of a path or of an address
DOTTED = re.compile(r"(?<![\w./@-])(?:mi|moe_interp)((?:\.[A-Za-z_]\w*)+)")
ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([\w.]+)`")
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}

DEFINED = {
    node.name
    for path in FILES
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
}


def found_in(start: Any, names: list[str]) -> bool:
    """Whether attributes lead from an object to the last of the names; a field of a dataclass counts."""
    for name in names:
        if isinstance(start, type) and name in getattr(start, "__annotations__", {}):
            return True
        if not hasattr(start, name):
            return False
        start = getattr(start, name)
    return True


def exists(name: str) -> bool:
    """Whether a name below ``moe_interp`` is a module, or something in one."""
    parts = ["moe_interp", *name.split(".")]
    for n in range(len(parts), 0, -1):
        if ".".join(parts[:n]) in MODULES:
            return found_in(importlib.import_module(".".join(parts[:n])), parts[n:]) or found_in(mi, parts[1:])
    return False


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_dotted_names_of_the_package(path: Path) -> None:
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    named = [(n, match.group(1)[1:]) for n, line in lines for match in DOTTED.finditer(line)]
    assert not [(n, name) for n, name in named if not exists(name)]


def docstrings(path: Path) -> Iterator[tuple[str | None, str]]:
    """``(class or None, docstring)`` of everything in a file, the strings that follow constants included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    owners = {id(inner): c.name for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for inner in ast.walk(c)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield owners.get(id(node)), node.value.value


def refers(target: str, module: ModuleType, owner: str | None) -> bool:
    if target.startswith("moe_interp."):
        return exists(target.removeprefix("moe_interp."))
    if target.startswith("."):  # something in a file of that name
        name, *rest = target[1:].split(".")
        files = [importlib.import_module(other) for other in MODULES if other.endswith(f".{name}")]
        return any(found_in(file, rest) for file in files)
    names = target.split(".")
    places = [module, *([getattr(module, owner)] if owner and hasattr(module, owner) else [])]
    # of another file: a function or class, which a search finds
    return any(found_in(place, names) for place in places) or target in DEFINED


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_references_of_docstrings(path: Path) -> None:
    module = importlib.import_module(next(name for name, file in MODULES.items() if file == path))
    named = [(target, owner) for owner, text in docstrings(path) for target in ROLE.findall(text)]
    assert not [target for target, owner in named if not refers(target, module, owner)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_docstrings_name(path: Path) -> None:
    named = [name for _, text in docstrings(path) for name in re.findall(r"``([\w/]+\.py)``", text)]
    assert not [
        name
        for name in named
        if not any((place / name).is_file() for place in (ROOT, ROOT / "moe_interp", path.parent))
    ]


def test_names_that_there_are_not_are_found() -> None:
    assert exists("attach")
    assert exists("routes.score.score_routes")
    assert exists("engine.memory.Memory.in_parts")
    assert not exists("atach")
    assert not exists("routes.score.score_root")
    assert not exists("engine.memory.Memory.in_thirds")
    module = importlib.import_module("moe_interp.engine.memory")
    assert refers("free_bytes", module, None)
    assert refers("in_halves", module, "Memory")
    assert not refers("in_thirds", module, "Memory")
    assert [m.group(1) for m in DOTTED.finditer("see `mi.attach(...)`, ../moe_interp.md and moe_interp.stats.")] == [
        ".attach",
        ".stats",
    ]
