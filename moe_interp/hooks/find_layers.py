"""Finding the MoE layers of a bridge, and opening their forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.moe import MoEBridge

from moe_interp.arch.families import build_spec, find_container
from moe_interp.arch.modules import unwrap
from moe_interp.arch.spec import MoESpec
from moe_interp.errors import AttachError
from moe_interp.hooks.blocks import OpenedBlock
from moe_interp.hooks.experts import OpenedExperts, OpenedProjection, OpenedShared
from moe_interp.hooks.layer import Opened, OpenLayer
from moe_interp.hooks.router import OpenedRouter
from moe_interp.types import Layer

_STACKS: dict[str, Callable[[int], Layer]] = {
    "blocks": lambda index: index,
    "encoder_blocks": lambda index: ("encoder", index),
    "decoder_blocks": lambda index: ("decoder", index),
}


def find_layers(bridge: TransformerBridge) -> dict[Layer, tuple[str, MoESpec]]:
    """Label -> (path of the bridge's block, spec), for every MoE layer.

    Raises:
        AttachError: there is none, or its family is unknown.
    """
    found: dict[Layer, tuple[str, MoESpec]] = {}
    unknown = []
    above = _holders(bridge)
    for label, path, block in _blocks(bridge):
        hf_layer = unwrap(block)
        match = find_container(hf_layer)
        if match is not None:
            family, container = match
            found[label] = (path, build_spec(family, container, hf_layer, label, above[path]))
        else:
            unknown += [type(unwrap(m)).__name__ for m in block.modules() if _is_unknown_moe(m)]
    if found:
        return found
    architecture = getattr(bridge.cfg, "architecture", None) or type(bridge.original_model).__name__
    if unknown:
        raise AttachError(
            f"{architecture}, whose MoE layers are of the unknown class {unknown[0]}",
            "a family of moe_interp.support_table()",
            "A routing rule cannot be guessed: add the family to moe_interp/arch/families.py.",
        )
    raise AttachError(
        f"{architecture}, a model without MoE layers",
        "a Mixture-of-Experts model",
        "See moe_interp.support_table() for the families.",
    )


@dataclass(frozen=True, eq=False)
class LayerPath:
    """A path in a model, at which a layer was found: to notice when something else is put there.

    Attributes:
        model: The transformers model.
        path: Of the layer, inside of any wrappers; empty where it was not found.
        inside: Of the block of experts within the layer, when it was found.
    """

    model: nn.Module
    path: str
    inside: str

    def still_holds(self, container: nn.Module) -> bool:
        """Whether the layer that is there now holds the block, wherever in it."""
        try:
            layer = self.model.get_submodule(self.path)
        except AttributeError:
            return False
        try:
            if layer.get_submodule(self.inside) is container:
                return True
        except AttributeError:  # something was put around it
            pass
        return any(module is container for module in layer.modules())


def find_path(model: nn.Module, spec: MoESpec) -> LayerPath:
    """Where a spec's layer is, as the model calls it."""
    path = next((name for name, module in model.named_modules() if unwrap(module) is spec.hf_layer), "")
    layer = model.get_submodule(path)
    return LayerPath(
        model, path, next((name for name, module in layer.named_modules() if module is spec.container), "")
    )


def describe_layer(bridge: TransformerBridge, layer: Any) -> str:
    """In words, why a label is not among the attached layers."""
    exists = any(label == layer and not isinstance(layer, (bool, float)) for label, _, _ in _blocks(bridge))
    return "is not attached, or is dense" if exists else "does not exist"


def open_layer(layer: OpenLayer) -> None:
    """Put our forwards in the place of the modules' own; modules that are there already open stay as they are."""
    wanted = _to_open(layer.spec)
    for kind in [kind for kind, opened in layer.opened.items() if wanted.get(kind) is not opened.module]:
        layer.opened.pop(kind).close()
    for kind, module in wanted.items():
        if kind not in layer.opened:
            layer.opened[kind] = kind(layer, module)


def close_layer(layer: OpenLayer) -> None:
    """Give the modules their own forwards back."""
    for opened in reversed(layer.opened.values()):
        opened.close()
    layer.opened.clear()


def _to_open(spec: MoESpec) -> dict[type[Opened], nn.Module]:
    """What to open of a layer, as its modules are now."""
    wanted: dict[type[Opened], nn.Module] = {OpenedBlock: spec.container, OpenedRouter: spec.router}
    if not spec.family.routes_at_router:
        wanted[OpenedExperts] = spec.experts
    if spec.projection is not None:
        wanted[OpenedProjection] = spec.projection
    if spec.shared is not None:
        wanted[OpenedShared] = spec.shared
    return wanted


def _blocks(bridge: TransformerBridge) -> Iterator[tuple[Layer, str, nn.Module]]:
    for stack, label in _STACKS.items():
        blocks: Any = bridge._modules.get(stack) or ()
        for index, block in enumerate(blocks):
            yield label(index), f"{stack}.{index}", block


def _holders(bridge: TransformerBridge) -> dict[str, tuple[nn.Module, ...]]:
    """By a block's path on the bridge, the transformers modules that hold it, the nearest first."""
    layers = {id(unwrap(block)): path for _, path, block in _blocks(bridge)}
    found: dict[str, tuple[nn.Module, ...]] = dict.fromkeys(layers.values(), ())
    modules = dict(bridge.original_model.named_modules())
    for name, module in modules.items():
        if id(module) in layers:
            parts = name.split(".")
            names = [".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1)]
            found[layers[id(module)]] = tuple(modules[n] for n in names if unwrap(modules[n]) is not module)
    return found


def _is_unknown_moe(module: nn.Module) -> bool:
    return isinstance(module, MoEBridge) and not module.bound_dense and hasattr(unwrap(module), "experts")
