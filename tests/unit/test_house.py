"""The rules of the house: who may import whom, public names, and what an import may load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest

import moe_interp as mi

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "moe_interp"
FILES = sorted(PACKAGE.rglob("*.py"))

BASE = {"errors", "types", "slots", "checks", "progress", "disk", "jsonlines", "tokenization"}
NUMBERS = {"stats", "results"}
TOWER = ["arch", "hooks", "engine", "interventions"]
METHODS = {"patching", "routes", "traces"}
# folder -> the folders and files it may import; its own are always allowed
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "types": {"slots"},
    "slots": set(),
    "checks": {"errors"},
    "tokenization": {"errors", "checks"},
    "progress": {"errors", "types"},
    "disk": {"errors"},
    "jsonlines": {"errors", "disk"},
    "processes": set(),
    "stats": {"errors", "types", "checks"},
    "results": {"errors", "types", "checks", "disk", "stats"},
    "plots": {"errors", "types", "stats", "results"},
    "report": {"errors", "types", "stats", "results", "plots"},
    "arch": BASE,
    "routing_view": BASE,
    "hooks": BASE | {"arch", "routing_view"},
    "interventions": BASE | {"arch", "hooks"},
    "engine": BASE | {"arch", "hooks"},
    "patching": BASE | {*TOWER} | NUMBERS,
    "routes": BASE | {*TOWER} | NUMBERS,
    "traces": BASE | {*TOWER} | NUMBERS,
    "verification": BASE | {*TOWER} | METHODS,
    "experiments": BASE | {*TOWER} | NUMBERS | METHODS | {"routing_view", "processes"},
    "runs": BASE | {*TOWER} | NUMBERS | METHODS | {"experiments"},
    "testbed": BASE | {*TOWER} | NUMBERS | {"traces", "processes"},
    "assets": BASE,
}
EVERYTHING = {"cli", "__init__"}
# the public table, by which results find what loads and shows them
UPWARD = {("results", "__init__")}
IMPORTS = (ast.Import, ast.ImportFrom)


def part_of(path: Path) -> str:
    """The folder or file of the package that a file belongs to."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> list[tuple[str, str | None, ast.AST]]:
    """``(module, name or None, node)`` of every import of moe_interp in a file."""
    found: list[tuple[str, str | None, ast.AST]] = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [(node.module or "", alias.name, node) for alias in node.names]
    return [each for each in found if each[0].split(".")[0] == "moe_interp"]


def imported_parts(path: Path) -> Iterator[str]:
    for module, name, _ in imports(path):
        parts = module.split(".")
        if len(parts) > 1:
            yield parts[1]
        elif name is not None:
            yield name if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file() else "__init__"


def test_every_folder_imports_only_what_it_may() -> None:
    wrong = []
    for path in FILES:
        part = part_of(path)
        if part in EVERYTHING:
            continue
        assert part in MAY_IMPORT, f"{part} has no place in the house yet"
        for other in imported_parts(path):
            if other not in MAY_IMPORT[part] | {part} and (part, other) not in UPWARD:
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_the_command_line() -> None:
    assert not [path for path in FILES if part_of(path) != "cli" and "cli" in imported_parts(path)]


def test_no_import_hides_inside_a_function_but_for_commands_that_first_check_their_options() -> None:
    """The command line answers mistakes before it imports what it works with; its files hold no circle all the same."""
    lazy = []
    for path in FILES:
        if part_of(path) == "cli":
            continue
        functions = [n for n in ast.walk(parsed(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        inner = [node for function in functions for node in ast.walk(function) if isinstance(node, IMPORTS)]
        lazy += [f"{path.relative_to(ROOT)}:{n.lineno}" for n in inner if "moe_interp" in ast.unparse(n)]
    assert not lazy, f"imports inside functions: {lazy}"


def test_files_import_each_other_without_circles() -> None:
    """Imports for the type checker alone do not count."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        typing_only = {id(n) for block in ast.walk(parsed(path)) if _is_type_checking(block) for n in ast.walk(block)}
        targets = [(module, name) for module, name, node in imports(path) if id(node) not in typing_only]
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = {module for module, _ in targets} | {f"{module}.{imported}" for module, imported in targets}
    graph = {
        name: {target for target in targets if target in graph and target != name} for name, targets in graph.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def test_modules_named_by_strings_stand_in_two_places() -> None:
    """``__init__`` resolves the public names; ``MoEHooks`` finds the checks and the view, which stand above it."""
    above = {"moe_interp.verification.verify:verify", "moe_interp.experiments.show_routing:show"}
    allowed = {Path("__init__.py"): None, Path("hooks/attach.py"): above}
    wrong = []
    for path in FILES:
        known = allowed.get(path.relative_to(PACKAGE), set())
        if known is None:
            continue
        texts = [n for n in ast.walk(parsed(path)) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        named = [n for n in texts if names_a_module(n.value) and n.value not in known]
        wrong += [f"{path.relative_to(ROOT)}:{n.lineno} {n.value}" for n in named]
    assert not wrong, "\n".join(wrong)


def names_a_module(text: str) -> bool:
    """Whether a string is the dotted name of a module of the package, or of something in one."""
    parts = text.split(":")[0].split(".")
    if parts[0] != "moe_interp" or len(parts) < 2 or not all(part.isidentifier() for part in parts):
        return False
    return any((PACKAGE.joinpath(*parts[1:n])).with_suffix(".py").is_file() for n in range(2, len(parts) + 1))


def test_no_file_and_no_folder_outgrows_what_one_reads_at_a_sitting() -> None:
    long = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    table = PACKAGE / "arch" / "families.py"
    assert not {str(path): n for path, n in long.items() if n > 450 and path != table}
    folders = Counter(path.parent for path in FILES)
    assert not {str(folder): n for folder, n in folders.items() if n > 14}


def test_only_the_engine_knows_what_processor_it_runs_on() -> None:
    wrong = []
    for path in FILES:
        for module, name, _ in imports(path):
            deep = f"{module}.{name}" if module == "moe_interp.engine" else module
            if part_of(path) != "engine" and deep.startswith(("moe_interp.engine.cpu", "moe_interp.engine.cuda")):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_no_private_name_crosses_a_file() -> None:
    wrong = []
    for path in FILES + sorted((ROOT / "examples").glob("*.py")):
        for module, name, node in imports(path):
            parts = [*module.split("."), *([name] if name else [])]
            if any(part.startswith("_") and not part.startswith("__") for part in parts):
                wrong.append(f"{path.relative_to(ROOT)}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_public_names_resolve_and_match_all() -> None:
    assert mi.__all__ == sorted(mi.__all__)
    assert len(set(mi.__all__)) == len(mi.__all__)
    for name in mi.__all__:
        assert getattr(mi, name) is not None
    assert dir(mi) == mi.__all__  # what completion offers: no submodule, no import of ours
    with pytest.raises(AttributeError, match=r"has no attribute 'atach'\. Did you mean 'attach'\?"):
        _ = mi.atach
    with pytest.raises(AttributeError, match=r"no attribute 'xyzzy'\. Public names: .*attach, .*load_demo"):
        _ = mi.xyzzy
    assert mi.__version__ == version("moe-interp")


def test_type_checkers_see_the_names_that_are_resolved_on_first_use() -> None:
    block = next(n for n in parsed(PACKAGE / "__init__.py").body if isinstance(n, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom), ast.unparse(node)
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name}: only 'as' exports a name to type checkers"
            seen[alias.name] = f"moe_interp.{alias.name}" if node.module == "moe_interp" else node.module
    assert seen == mi._HOME


def test_subpackages_export_what_they_say() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        module = ".".join(path.relative_to(ROOT).parent.parts)
        exported = getattr(__import__(module, fromlist=["x"]), "__all__", [])
        assert sorted(set(exported)) == sorted(exported), module
        for name in exported:
            assert hasattr(__import__(module, fromlist=[name]), name), f"{module}.{name}"


def loaded_by(*codes: str) -> list[set[str]]:
    """Top-level modules in one fresh interpreter, after each of the pieces of code."""
    show = "import sys\nprint(*{name.split('.')[0] for name in sys.modules})"
    script = "\n".join(f"{code}\n{show}" for code in codes)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_importing_the_package_adds_nothing_heavy() -> None:
    heavy = {"xarray", "plotly", "matplotlib", "typer", "pandas", "scipy", "rich", "pydantic"}
    assert not (heavy | {"torch"}) & loaded_by("import moe_interp")[0]
    bridge, package, attached = loaded_by(
        "import transformer_lens.model_bridge", "import moe_interp", "moe_interp.attach"
    )
    assert not heavy & (package - bridge)
    # attaching may not bring them either
    assert not {"xarray", "plotly", "matplotlib", "typer"} & (attached - bridge)


WITHOUT_TORCH = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformer_lens", "transformers"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import moe_interp.stats
"""


def test_statistics_are_importable_without_torch() -> None:
    assert not {"torch", "xarray", "pandas", "matplotlib"} & loaded_by(WITHOUT_TORCH)[0]


def test_only_plots_and_report_know_a_plotting_library() -> None:
    for path in FILES:
        if part_of(path) not in {"plots", "report"}:
            assert not re.search(r"^\s*(import|from) (matplotlib|plotly)", path.read_text(encoding="utf-8"), re.M), path


def test_no_file_names_a_place_of_the_machine_it_was_written_on() -> None:
    places = re.compile("|".join(["/" + "work/", "/" + "root/", "/" + "tmp/", "shared/" + "design"]))
    texts = [
        p for folder in ("moe_interp", "tests", "examples", "benchmarks", "docs") for p in (ROOT / folder).rglob("*")
    ]
    texts += [ROOT / name for name in ("README.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "constraints.txt")]
    known = {".py", ".md", ".toml", ".txt", ".json", ".jsonl", ".css", ".html", ".js", ""}
    wrong = []
    for path in texts:
        if not path.is_file() or path.suffix not in known or "__pycache__" in path.parts:
            continue
        if found := places.search(path.read_text(encoding="utf-8", errors="replace")):
            wrong.append(f"{path.relative_to(ROOT)}: {found.group()}")
    assert not wrong, "\n".join(wrong)
