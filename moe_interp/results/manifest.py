"""Where a result comes from: versions, git hash, configuration, seeds and a checksum of the data it was made from."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

import moe_interp
from moe_interp.errors import ResultError

PACKAGES = ("torch", "transformers", "transformer-lens", "numpy", "scipy", "xarray", "pandas")


@dataclass(frozen=True)
class Manifest:
    """What a saved result says about its own origin. All fields are plain JSON values.

    Attributes:
        kind: Name of the result class, such as ``"isolation"``.
        schema: Layout of the file; a file of another schema is refused.
        moe_interp: Version of this package that wrote it.
        versions: Version of Python and of each package in ``PACKAGES`` that is installed.
        git_hash: Commit of this package's checkout, ``-dirty`` where it has changes; None for an installed wheel.
        created: UTC time, ISO 8601.
        config: The options of the run.
        seeds: Seed by name.
        data_checksum: :func:`checksum` of the items or sequences the result was computed from.
        content_checksum: SHA-256 of the stored arrays; checked on loading.
    """

    kind: str
    schema: str
    moe_interp: str
    versions: dict[str, str]
    git_hash: str | None
    created: str
    config: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    data_checksum: str | None = None
    content_checksum: str | None = None

    def to_json(self) -> str:
        """The manifest as indented JSON."""
        return json.dumps(asdict(self), indent=2, default=plain)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The manifest that :meth:`to_json` wrote; fields that this version does not know are left out.

        Raises:
            ValueError, TypeError: not JSON, a field is missing, or a field is of another type.
        """
        given = json.loads(text)
        known = {name: given[name] for name in cls.__dataclass_fields__ if name in given}
        for name, types in FIELD_TYPES.items():
            if name in known and not isinstance(known[name], types):
                raise TypeError(f"the manifest's {name} is a {type(known[name]).__name__}")
        return cls(**known)


TEXT, OPTIONAL = (str,), (str, type(None))
FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "kind": TEXT,
    "schema": TEXT,
    "moe_interp": TEXT,
    "created": TEXT,
    "versions": (dict,),
    "config": (dict,),
    "seeds": (dict,),
    "git_hash": OPTIONAL,
    "data_checksum": OPTIONAL,
    "content_checksum": OPTIONAL,
}


def describe(
    kind: str,
    schema: str,
    config: Mapping[str, Any] | None = None,
    seeds: Mapping[str, int] | int | None = None,
    data_checksum: str | None = None,
) -> Manifest:
    """A manifest of the running process: versions, commit and time are looked up, the rest is as given."""
    named = {"seed": int(seeds)} if isinstance(seeds, Integral) else dict(seeds or {})  # type: ignore[arg-type]
    return Manifest(
        kind=kind,
        schema=schema,
        moe_interp=moe_interp.__version__,
        versions=installed_versions(),
        git_hash=git_hash(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        # through JSON and back, so that a result equals the one that is loaded from its file
        config=json.loads(json.dumps(dict(config or {}), default=plain)),
        seeds=named,
        data_checksum=data_checksum,
    )


def installed_versions() -> dict[str, str]:
    """Version of Python and of each installed package in ``PACKAGES``, without importing any."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_hash() -> str | None:
    """Commit of the checkout that this package runs from, with ``-dirty`` for changes; None where there is none."""
    root = Path(moe_interp.__file__).parents[1]
    if not (root / ".git").exists():  # a wheel inside somebody else's repository must not borrow its commit
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def checksum(values: Iterable[Any]) -> str:
    """SHA-256 over a sequence of JSON-like records, dataclasses or arrays, in their order.

    Two data sets have the same checksum only if they hold the same records in the same order; the file they were read
    from does not enter.
    """
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True, default=plain).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """A JSON value for what ``json`` cannot write itself: arrays, numpy scalars, dataclasses, paths, dtypes.

    Raises:
        ResultError: The value has no faithful JSON form.
    """
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if hasattr(value, "detach"):  # a tensor
        return value.detach().cpu().tolist()
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Path) or type(value).__module__.split(".")[0] in {"torch", "numpy"}:
        return str(value)  # dtypes and devices
    raise ResultError(
        f"A value of type {type(value).__name__} in a manifest",
        "numbers, text, lists, dictionaries, arrays, paths, dtypes or dataclasses of these",
        "Pass its name or its settings instead.",
    )
