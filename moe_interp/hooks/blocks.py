"""The block itself: where a pass opens and closes, and the three families that call their experts in their own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moe_interp.arch.layouts import DenseScores, OneHot
from moe_interp.hooks.experts import EXPERT_HOOKS, finish, mix
from moe_interp.hooks.layer import OpenLayer, Pass, is_edited


class OpenedBlock:
    """The container of router and experts: where a pass begins and ends."""

    def __init__(self, layer: OpenLayer, native_forward: Any) -> None:
        self.layer, self.native_forward = layer, native_forward

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        layer.last_pos = hidden.shape[-2]
        if not layer.is_hooked():
            return self.native_forward(hidden, *args, **kwargs)
        batch, pos = hidden.shape[:2] if hidden.ndim == 3 else (1, hidden.shape[0])
        layer.running = Pass(batch, pos)
        try:
            if layer.spec.family.own_block and layer.is_hooked(*_block_hooks(layer)):
                return _OWN_BLOCKS[layer.spec.family.name](layer, layer.running, hidden)
            return self.native_forward(hidden, *args, **kwargs)
        finally:
            layer.running = None


def _block_hooks(layer: OpenLayer) -> tuple[str, ...]:
    """The hooks that the family's own block cannot serve; a one-hot choice has no room for a second slot."""
    after = (*EXPERT_HOOKS, "routed_out", "shared_out")
    return (*after, "expert_indices") if isinstance(layer.spec.family.layout, OneHot) else after


def _llama4(layer: OpenLayer, run: Pass, hidden: Tensor) -> tuple[Tensor, Tensor]:
    block: Any = layer.spec.container
    x = hidden.reshape(-1, hidden.shape[-1])
    out = block.router(x)
    _follow(layer, run, out)
    routed = finish(layer, run, mix(layer, run, x))
    return block.shared_expert(x) + routed, out[1]


def _jetmoe(layer: OpenLayer, run: Pass, hidden: Tensor) -> Tensor:
    block: Any = layer.spec.container
    x = hidden.reshape(-1, hidden.shape[-1])
    block.router(x)
    return finish(layer, run, mix(layer, run, x)).view(hidden.shape) + block.bias


def _switch(layer: OpenLayer, run: Pass, hidden: Tensor) -> Tensor:
    block: Any = layer.spec.container
    _follow(layer, run, block.router(hidden))
    return finish(layer, run, mix(layer, run, hidden.reshape(-1, hidden.shape[-1]))).view(hidden.shape)


def _follow(layer: OpenLayer, run: Pass, out: Any) -> None:
    """Where a hook of TransformerLens edited the choice that the router returned, go on with the edited one."""
    layout = layer.spec.family.layout
    assert isinstance(layout, DenseScores | OneHot)
    if is_edited(out[0], run.handed_on[0]):
        indices, weights = layout.handed_on(out)
        run.indices, run.weights = run.fold(indices), run.fold(weights)


_OWN_BLOCKS: dict[str, Callable[[OpenLayer, Pass, Tensor], Any]] = {
    "llama4": _llama4,
    "jetmoe": _jetmoe,
    "switch_transformers": _switch,
}
