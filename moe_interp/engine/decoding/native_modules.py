"""A model's own modules in the places of TransformerLens' components, for passes that nobody looks into."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from moe_interp.arch.modules import has_foreign_hooks
from moe_interp.hooks.attach import MoEHooks


class NativeModules:
    """Passes without hooks through the modules that transformers built, which TransformerLens' components wrap.

    A component fires its hook points and computes some steps anew for them; attention is the largest. A model with any
    hook, or with weights that TransformerLens has folded, keeps its components.

    Args:
        moe: Attached hooks.
    """

    def __init__(self, moe: MoEHooks) -> None:
        self._bridge = moe.bridge
        self.look()

    def look(self) -> None:
        """See which modules there are, which have another forward (they stay), and what hangs on them."""
        modules = [*self._bridge.original_model.modules()]
        slots: list[tuple[nn.Module, str, Any]] = [
            (module, name, child) for module in modules for name, child in module._modules.items()
        ]
        wrapped = [s for s in slots if isinstance(s[2], GeneralizedComponent) and s[2].original_component is not None]
        self._slots: list[tuple[dict[str, Any], str, Any, nn.Module]] = [
            (module._modules, name, component, component._modules["_original_component"])
            for module, name, component in wrapped
            if "forward" not in component.__dict__
        ]
        points: list[Any] = [module for module in self._bridge.modules() if isinstance(module, HookPoint)]
        self._of_points = [hooks for point in points for hooks in _hooks_of(point)]
        components: list[Any] = [component for _, _, component in wrapped]
        self._of_components = [hooks for component in components for hooks in _hooks_of(component)]
        self._n_known = sum(map(len, self._of_components))
        self._may = not getattr(self._bridge, "compatibility_mode", False) and not any(map(_is_looked_into, components))

    @property
    def is_free(self) -> bool:
        """Whether nobody looks into the components, and their numbers are the model's own."""
        # every pass asks: dictionaries of hooks rather than their modules
        return self._may and not any(self._of_points) and sum(map(len, self._of_components)) == self._n_known

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the ``with``, a pass runs the model's own modules if it may; the components are back after."""
        swapped = []
        try:
            if self.is_free:
                for modules, name, component, native in self._slots:
                    if modules.get(name) is component:
                        modules[name] = native
                        swapped.append((modules, name, component))
            yield
        finally:
            for modules, name, component in swapped:
                modules[name] = component


def _hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def _is_looked_into(component: nn.Module) -> bool:
    return bool(component._backward_hooks or component._backward_pre_hooks) or has_foreign_hooks(component)
