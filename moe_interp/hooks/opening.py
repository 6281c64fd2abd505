"""Finding the MoE layers of a bridge, and opening their forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.moe import MoEBridge

from moe_interp.arch.families import build_spec, find_container
from moe_interp.arch.modules import child, unwrap
from moe_interp.arch.spec import MoESpec
from moe_interp.errors import AttachError
from moe_interp.hooks.blocks import OpenedBlock
from moe_interp.hooks.experts import OpenedExperts, OpenedProjection, OpenedShared
from moe_interp.hooks.layer import OpenLayer
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
    for label, path, block in _blocks(bridge):
        hf_layer = unwrap(block)
        match = find_container(hf_layer)
        if match is not None:
            family, container = match
            found[label] = (path, build_spec(family, container, hf_layer, label))
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


def describe_layer(bridge: TransformerBridge, layer: Any) -> str:
    """In words, why a label is not among the attached layers."""
    exists = any(label == layer and not isinstance(layer, (bool, float)) for label, _, _ in _blocks(bridge))
    return "is not attached, or is dense" if exists else "does not exist"


def open_layer(layer: OpenLayer) -> None:
    """Put our forwards in the place of the modules' own.

    Bound methods of plain objects, not closures: a deep copy of the model is then open on its own.
    """
    spec = layer.spec
    _replace(layer, spec.container, OpenedBlock)
    _replace(layer, spec.router, OpenedRouter)
    if not spec.family.own_block:
        _replace(layer, spec.experts, OpenedExperts)
    if spec.family.latent:
        _replace(layer, child(spec.container, spec.family.latent), OpenedProjection)
    if spec.shared is not None:
        _replace(layer, spec.shared, OpenedShared)


def close_layer(layer: OpenLayer) -> None:
    """Give the modules their own forwards back."""
    for module, before in reversed(layer.replaced):
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before
    layer.replaced.clear()


def _replace(layer: OpenLayer, module: nn.Module, opened: Callable[..., Any]) -> None:
    layer.replaced.append((module, module.__dict__.get("forward")))
    module.__dict__["forward"] = opened(layer, module.forward).forward


def _blocks(bridge: TransformerBridge) -> Iterator[tuple[Layer, str, nn.Module]]:
    for stack, label in _STACKS.items():
        blocks: Any = bridge._modules.get(stack) or ()
        for index, block in enumerate(blocks):
            yield label(index), f"{stack}.{index}", block


def _is_unknown_moe(module: nn.Module) -> bool:
    return isinstance(module, MoEBridge) and not module.bound_dense and hasattr(unwrap(module), "experts")
