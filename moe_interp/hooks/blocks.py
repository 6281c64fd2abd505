"""The block itself: where a pass opens and closes, and the three families that call their experts in their own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moe_interp.arch.router_outputs import DenseScores, OneHot
from moe_interp.errors import HookError
from moe_interp.hooks.edits import is_edited
from moe_interp.hooks.experts import EXPERT_HOOKS, fire_block_outputs, sum_of_experts
from moe_interp.hooks.layer import LayerPass, Opened, OpenLayer


class OpenedBlock(Opened):
    """The container of router and experts: where a pass begins and ends."""

    def call(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        layer.last_pos = hidden.shape[-2]
        if not layer.is_hooked():
            return self.native_forward(hidden, *args, **kwargs)
        layer.prepare()
        batch, pos = hidden.shape[:2] if hidden.ndim == 3 else (1, hidden.shape[0])
        outer, layer.running = layer.running, LayerPass(batch, pos)
        try:
            own = _replacement_block(layer)
            out = self.native_forward(hidden, *args, **kwargs) if own is None else own(layer, layer.running, hidden)
            _check_seen(layer, layer.running)
            return out
        finally:
            layer.running = outer  # a pass inside of a hook has ended


def _replacement_block(layer: OpenLayer) -> Callable[[OpenLayer, LayerPass, Tensor], Any] | None:
    """The block in our words, where the family's own cannot serve the hooks that are in use."""
    if type(layer.spec.container).__name__ in _FUSED:
        return _gpt_oss_unfused
    own = layer.spec.family.routes_at_router and layer.is_hooked(*_block_hooks(layer))
    return _REPLACEMENT_BLOCKS[layer.spec.family.name] if own else None


def _check_seen(layer: OpenLayer, run: LayerPass) -> None:
    """Refuse a block that went past its router's or its experts' forward, where hooks would not have fired."""
    for part, missed in (("router", run.rule is None), ("experts", run.indices is None)):
        if missed:
            module = getattr(layer.spec, part)
            raise HookError(
                f"a pass through layer {layer.spec.layer!r} in which the {part} ({type(module).__name__}) did not run "
                "through the forward that was opened for the hooks",
                "a block that calls its router and its experts as modules",
                "If their forward was replaced after attaching, detach and attach anew; switch off fused kernels "
                "of the block.",
            )


def _block_hooks(layer: OpenLayer) -> tuple[str, ...]:
    """The hooks that the family's own block cannot serve; a one-hot choice has no room for a second slot."""
    after = (*EXPERT_HOOKS, "routed_out", "shared_out")
    return (*after, "expert_indices") if isinstance(layer.spec.family.layout, OneHot) else after


def _llama4(layer: OpenLayer, run: LayerPass, hidden: Tensor) -> tuple[Tensor, Tensor]:
    block: Any = layer.spec.container
    x = hidden.reshape(-1, hidden.shape[-1])
    out = block.router(x)
    if layer.is_hooked(*EXPERT_HOOKS):
        _take_edited_choice(layer, run, out)
        routed = sum_of_experts(layer, run, x)
    else:
        # shape: (expert * token, d_model), every token by every expert, most of them scaled to 0
        scaled = x.repeat(out[0].shape[1], 1) * out[0].transpose(0, 1).reshape(-1, 1)
        routed = block.experts(scaled).reshape(out[0].shape[1], *x.shape).sum(dim=0)
    return block.shared_expert(x) + fire_block_outputs(layer, run, routed), out[1]


def _jetmoe(layer: OpenLayer, run: LayerPass, hidden: Tensor) -> Tensor:
    block: Any = layer.spec.container
    x = hidden.reshape(-1, hidden.shape[-1])
    _, tokens, weights, sizes, _ = block.router(x)
    if layer.is_hooked(*EXPERT_HOOKS):
        routed = sum_of_experts(layer, run, x)
    else:
        gate, up = block.input_linear(x[tokens], sizes).chunk(2, dim=-1)
        out = block.output_linear(block.activation(gate) * up, sizes) * weights.unsqueeze(-1)
        routed = out.new_zeros(x.shape).index_add(0, tokens, out)
    return fire_block_outputs(layer, run, routed).view(hidden.shape) + block.bias


def _switch(layer: OpenLayer, run: LayerPass, hidden: Tensor) -> Tensor:
    block: Any = layer.spec.container
    x, out = hidden.reshape(-1, hidden.shape[-1]), block.router(hidden)
    _take_edited_choice(layer, run, out)
    assert run.indices is not None
    if layer.is_hooked(*EXPERT_HOOKS) or run.indices.shape[-1] > 1:
        routed = sum_of_experts(layer, run, x)
    else:
        chosen, weights, _ = out
        routed = block.experts(x, chosen.view(len(x), 1, -1), weights.view(-1, 1))
    return fire_block_outputs(layer, run, routed).view(hidden.shape)


def _take_edited_choice(layer: OpenLayer, run: LayerPass, out: Any) -> None:
    """Where a hook of TransformerLens edited the choice that the router returned, go on with the edited one."""
    layout, handed = layer.spec.family.layout, run.router_choice
    assert isinstance(layout, DenseScores | OneHot)
    assert handed is not None
    if not handed.is_unchanged(out[0]) and (out[0] is handed.tensor or is_edited(out[0], handed.tensor)):
        indices, weights = layout.chosen_route(out)
        run.indices, run.weights = run.fold(indices), run.fold(weights)


def _gpt_oss_unfused(layer: OpenLayer, run: LayerPass, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """GPT-OSS's block with packed weights, which otherwise routes inside of a fused kernel."""
    block: Any = layer.spec.container
    x = hidden.reshape(-1, hidden.shape[-1])
    logits, weights, indices = block.router(x)
    return block.experts(x, indices, weights).reshape(hidden.shape), logits


_FUSED = ("Mxfp4GptOssMLP",)
_REPLACEMENT_BLOCKS: dict[str, Callable[[OpenLayer, LayerPass, Tensor], Any]] = {
    "llama4": _llama4,
    "jetmoe": _jetmoe,
    "switch_transformers": _switch,
}
