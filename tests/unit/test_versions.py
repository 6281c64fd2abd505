"""The declared lowest versions are the tested ones, and what is written about versions agrees."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
DECLARED = [
    Requirement(text) for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
]


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, version in pairs}


def test_the_lowest_versions_are_those_that_are_tested() -> None:
    lowest, highest = pins("constraints-lowest.txt"), pins("constraints.txt")
    for requirement in DECLARED:
        name = canonicalize_name(requirement.name)
        bound = next(Version(s.version) for s in requirement.specifier if s.operator == ">=")
        assert lowest[name] in requirement.specifier
        assert highest[name] in requirement.specifier
        if name != "torch":  # pinned, as another build would be downloaded
            assert lowest[name].release[:3] == (*bound.release, 0, 0)[:3], f"{name}: {bound} declared"
    assert lowest["torch"] == highest["torch"]


def test_the_range_of_transformers_is_the_same_wherever_it_is_written() -> None:
    specifier = next(r.specifier for r in DECLARED if r.name == "transformers")
    lower = next(s.version for s in specifier if s.operator == ">=")
    upper = pins("constraints.txt")["transformers"]
    stated = f"{lower} to {upper.major}.{upper.minor}"
    assert f"transformers {stated}" in re.sub(r"\s+", " ", (ROOT / "README.md").read_text(encoding="utf-8"))
    outputs = (ROOT / "moe_interp" / "arch" / "router_outputs.py").read_text(encoding="utf-8")
    assert f"Install transformers {stated};" in outputs
