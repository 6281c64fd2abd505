"""moe_interp: Mixture-of-Experts layers as HookPoints of a TransformerLens bridge, and experiments on them.

The names below are resolved on first use, so that ``import moe_interp`` stays as light as TransformerLens' bridge.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# public name -> module that defines it; a module's own name stands for the module itself
_HOME = {
    "MoEInterpError": "moe_interp.errors",
    "MoEHooks": "moe_interp.hooks.attach",
    "attach": "moe_interp.hooks.attach",
    "attached": "moe_interp.hooks.attach",
    "stats": "moe_interp.stats",
}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    try:
        home = _HOME[name]
    except KeyError:
        known = ", ".join(__all__)
        raise AttributeError(f"module 'moe_interp' has no attribute {name!r}; public names: {known}") from None
    module = import_module(home)
    value = module if home.rpartition(".")[2] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
