"""Finding transformers modules behind TransformerLens' wrappers."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrap(module: Any) -> Any:
    """The transformers module inside any number of TransformerLens component bridges."""
    while isinstance(inner := getattr(module, "original_component", None), nn.Module):
        module = inner
    return module


def child(module: nn.Module, path: str) -> Any:
    """A submodule by dotted path, unwrapped at every step; the module itself for an empty path; None where absent."""
    found: Any = unwrap(module)
    for name in filter(None, path.split(".")):
        found = unwrap(getattr(found, name, None))
        if found is None:
            return None
    return found


def config_value(module: nn.Module, *names: str, default: Any = None) -> Any:
    """The first of the named attributes that a module's configuration has."""
    config = getattr(module, "config", None)
    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return default
