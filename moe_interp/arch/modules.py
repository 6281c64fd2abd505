"""Finding transformers modules behind TransformerLens' wrappers."""

from __future__ import annotations

from typing import Any

from torch import nn

_WRAPPED = ("original_component", "_orig_mod")  # TransformerLens' components, torch.compile's modules
_NATIVE = "transformers.models."
_HOOKS_THAT_LOOK = ("transformer_lens", "moe_interp", "transformers.utils.output_capturing")


def unwrap(module: Any) -> Any:
    """The transformers module inside any number of TransformerLens component bridges and compiled modules."""
    while True:
        inner = next((m for name in _WRAPPED if isinstance(m := getattr(module, name, None), nn.Module)), None)
        if inner is None:
            return module
        module = inner


def own_class(module: Any) -> type:
    """A module's class, without what torch derives from it for parametrized (or sharded) weights."""
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.nn.utils."))


def is_native(module: Any) -> bool:
    """Whether a module is of a class of transformers' own models: neither quantised, nor an adapter, nor a stranger."""
    return own_class(module).__module__.startswith(_NATIVE)


def native_part(module: nn.Module) -> nn.Module:
    """The family's own module inside adapters and wrappers; the module itself where there is none."""
    return next((part for part in module.modules() if is_native(part)), module)


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


def is_watched(native: Any) -> bool:
    """Whether a module's call is more than its class's ``forward``: hooks, weights moved in for it, another forward."""
    return bool(native._forward_hooks or native._forward_pre_hooks or {"forward", "_hf_hook"} & native.__dict__.keys())


def has_foreign_hooks(native: Any) -> bool:
    """Whether somebody else's hook is on a module: none of TransformerLens, of this package, or of transformers' own,
    which stay once outputs were captured, and do nothing in passes that capture none."""
    hooks = [*native._forward_hooks.values(), *native._forward_pre_hooks.values()]
    return any(not _is_of(hook, _HOOKS_THAT_LOOK) for hook in hooks)


def _is_of(hook: Any, modules: tuple[str, ...]) -> bool:
    defined = str(getattr(hook, "__module__", ""))
    return any(defined == module or defined.startswith(f"{module}.") for module in modules)
