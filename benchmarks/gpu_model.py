"""A model of a published shape with random weights, made on its device, and the arithmetic of branches in it."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from gpu_shapes import Shape
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module

from moe_interp.hooks.attach import MoEHooks


def build(
    shape: Shape, device: torch.device, dtype: torch.dtype, *, tiny: bool, layers: int | None = None
) -> TransformerBridge:
    """The model through a bridge, in eval mode; its weights are drawn on the device, without a copy elsewhere.

    Args:
        shape: The model.
        device, dtype: Where it is made, and its number format.
        tiny: At tiny sizes.
        layers: Only so many layers.
    """
    values = shape.published | (shape.tiny if tiny else {})
    if layers is not None:
        values = values | {"num_hidden_layers": layers}
    config = getattr(transformers, shape.config_class)(**values)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            torch.manual_seed(0)
            model = getattr(transformers, shape.architecture)(config).eval()
    finally:
        torch.set_default_dtype(before)
    return build_bridge_from_module(model, shape.architecture, hf_config=config)


def implementations(bridge: TransformerBridge) -> str:
    """How attention and experts run."""
    config: Any = bridge.original_model.config
    experts = getattr(config, "_experts_implementation", None)
    return f"attention {config._attn_implementation}, experts {experts}"


def free(device: torch.device) -> None:
    """Give back the memory of a model that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class BranchArithmetic:
    """Floating-point operations that no exact way of scoring branches can leave out, a multiply-add as two.

    A token of a branch costs, in each layer above its own, two for each weight of the layer's matrices (projections,
    router, shared or dense MLP) and of ``spec.top_k`` of its ``spec.n_experts`` experts, and the products of its query
    with the keys and of the shares with the values that it reads (a sliding window's where there is one); and two for
    each weight of the unembedding. In its own layer, each expert that any route of a token uses is computed once for
    that token. Not counted: the plain pass, which serves all layers, and norms, rotary steps, gates and sums. At the
    last layer too one unembedding a branch is counted, although fewer would do where routes are many.
    """

    def __init__(self, moe: MoEHooks) -> None:
        model: Any = moe.bridge.original_model
        config = model.config
        self.unembedding = 2 * model.get_output_embeddings().weight.numel()
        self.per_expert: dict[int, int] = {}
        self.per_token: list[int] = []  # by layer, without attention to the keys
        for index, block in enumerate(moe.bridge.blocks):
            matrices = {id(p): p for p in block.parameters() if p.ndim == 2}
            experts = 0
            if index in moe.layers:
                spec = moe.spec(index)
                stacked = list(spec.experts.parameters())
                self.per_expert[index] = sum(2 * p.numel() // spec.n_experts for p in stacked if p.ndim == 3)
                experts = spec.top_k * self.per_expert[index]
                for p in stacked:  # biases of all experts have two axes as well
                    matrices.pop(id(p), None)
            self.per_token.append(experts + sum(2 * p.numel() for p in matrices.values()))
        if getattr(config, "kv_lora_rank", None):
            widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        else:
            widths = 2 * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.per_key = 2 * config.num_attention_heads * widths
        kinds = getattr(config, "layer_types", None) or [""] * len(self.per_token)
        self.windows = [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]

    def of(self, layer: int, positions: Iterable[int], routes: Tensor) -> float:
        """Of the branches of some positions of one sequence.

        Args:
            layer: The routes' layer.
            positions: The positions that are scored.
            routes: ``[pos, route, slot]`` expert ids.
        """
        scored = list(positions)
        n_routes = routes.shape[1]
        used = sum(len(row.unique()) for row in routes[scored].flatten(1).cpu())
        above = range(layer + 1, len(self.per_token))
        total = used * self.per_expert[layer]
        total += len(scored) * n_routes * (self.unembedding + sum(self.per_token[index] for index in above))
        for index in above:
            window = self.windows[index] or max(scored) + 1
            total += n_routes * self.per_key * sum(min(pos + 1, window) for pos in scored)
        return float(total)
