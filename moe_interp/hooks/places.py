"""Where a layer's block is in the model, to notice when something else is put there."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from moe_interp.arch.modules import unwrap
from moe_interp.arch.spec import MoESpec


@dataclass(frozen=True, eq=False)
class Place:
    """A path in a model, at which a layer was found.

    Attributes:
        model: The transformers model.
        path: Of the layer, inside of any wrappers; empty where it was not found.
    """

    model: nn.Module
    path: str

    def still_holds(self, container: nn.Module) -> bool:
        """Whether the layer that is there now holds the block."""
        try:
            found = self.model.get_submodule(self.path)
        except AttributeError:
            return False
        return any(module is container for module in found.modules())


def find_place(model: nn.Module, spec: MoESpec) -> Place:
    """Where a spec's layer is, as the model calls it."""
    paths = (name for name, module in model.named_modules() if unwrap(module) is spec.hf_layer)
    return Place(model, next(paths, ""))
