"""MoE layers computed by hand from the weights of an untouched transformers model, one expert and one token at a time.

Everything is at full width: a route is a matrix ``[token, expert]`` of weights, zero where an expert does not run.
Nothing here imports moe_interp, so that the package is compared with something that cannot share its mistakes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests import tiny

# score, whether the chosen scores are normalised, scale: from the papers and the numbers in tiny_configs.json
RULES: dict[str, tuple[str, bool, float]] = {
    "mixtral": ("softmax", True, 1.0),
    "olmoe": ("softmax", False, 1.0),
    "flex_olmo": ("softmax", False, 1.0),
    "qwen2_moe": ("softmax", False, 1.0),
    "qwen3_moe": ("softmax", True, 1.0),
    "qwen3_next": ("softmax", True, 1.0),
    "qwen3_5_moe": ("softmax", True, 1.0),
    "qwen3_5_moe_vl": ("softmax", True, 1.0),
    "qwen3_vl_moe": ("softmax", True, 1.0),
    "gpt_oss": ("exp", True, 1.0),
    "deepseek_v2": ("softmax", False, 1.5),
    "deepseek_v2_greedy": ("softmax", False, 1.0),
    "deepseek_v3": ("sigmoid", True, 2.5),
    "deepseek_v4": ("sqrtsoftplus", True, 1.5),
    "glm4_moe": ("sigmoid", True, 2.5),
    "glm4_moe_lite": ("sigmoid", True, 2.5),
    "glm_moe_dsa": ("sigmoid", True, 2.5),
    "granite_moe": ("exp", True, 1.0),
    "granite_moe_hybrid": ("exp", True, 1.0),
    "jamba": ("softmax", False, 1.0),
    "jetmoe": ("exp", True, 1.0),
    "lfm2_moe": ("sigmoid", True, 1.0),
    "llama4": ("sigmoid", False, 1.0),
    "llama4_vl": ("sigmoid", False, 1.0),
    "minimax_m2": ("sigmoid", True, 1.0),
    "ernie4_5_moe": ("softmax", True, 1.0),
    "afmoe": ("sigmoid", True, 1.5),
    "laguna": ("capped sigmoid", True, 1.5),
    "nemotron_h": ("sigmoid", True, 1.5),
    "switch_transformers": ("softmax", False, 1.0),
    "gemma4_text": ("softmax", True, 1.0),
    "gemma4": ("softmax", True, 1.0),
}
BLOCK_OUTPUT = ("llama4", "llama4_vl", "jetmoe", "switch_transformers")  # the block calls its experts in its own way


def scores(name: str, logits: Tensor) -> Tensor:
    """What the family ranks and weighs by, before any correction."""
    kind = RULES[name][0]
    if kind == "capped sigmoid":
        return 1 / (1 + torch.exp(-5.0 * torch.tanh(logits / 5.0)))
    if kind == "sigmoid":
        return 1 / (1 + torch.exp(-logits))
    if kind == "sqrtsoftplus":
        return torch.log1p(torch.exp(logits)).sqrt()
    exponentials = torch.exp(logits - logits.max(-1, keepdim=True).values)
    return exponentials if kind == "exp" else exponentials / exponentials.sum(-1, keepdim=True)


def chosen_matrix(indices: Tensor, n_experts: int = 8) -> Tensor:
    """``[*, slot] -> [*token, expert]``, true where an expert runs; -1 is an empty slot."""
    return (indices.unsqueeze(-1) == torch.arange(n_experts)).any(-2)


def weight_matrix(indices: Tensor, weights: Tensor, n_experts: int = 8) -> Tensor:
    """``[*, slot] -> [*token, expert]`` of given weights."""
    hits = indices.unsqueeze(-1) == torch.arange(n_experts)
    return (hits * weights.unsqueeze(-1)).sum(-2)


def weights(name: str, layer: tiny.NativeMoE, logits: Tensor, chosen: Tensor) -> Tensor:
    """The family's weights ``[token, expert]`` for any chosen set ``[token, expert]``."""
    if name == "phimoe":
        return torch.stack([_sparse_mixer(z, set(c.nonzero().flatten().tolist())) for z, c in zip(logits, chosen)])
    _, normalised, scale = RULES[name]
    kept = torch.where(chosen, scores(name, logits), 0.0)
    if normalised:
        total = kept.sum(-1, keepdim=True) + (1e-6 if name == "lfm2_moe" else 0.0)
        kept = torch.where(total > 0, kept / torch.where(total > 0, total, 1.0), 0.0)
    if name.startswith("gemma4"):
        kept = kept * layer.router.per_expert_scale.detach()
    return kept * scale


def _sparse_mixer(logits: Tensor, chosen: set[int], jitter: float = 0.01) -> Tensor:
    """Phi-MoE: in descending order, each expert against those that are left and near enough to it."""
    row = torch.zeros_like(logits)
    taken: set[int] = set()
    for expert in sorted(chosen, key=lambda e: -float(logits[e])):
        top, total = logits[expert], torch.zeros_like(logits[0])
        for other, z in enumerate(logits):
            near = (top - z) / max(z.abs(), top) <= 2 * jitter
            if other == expert or (other not in taken and near):
                total = total + torch.exp(z - top)
        row[expert] = 1 / total
        taken.add(expert)
    return row


def expert(name: str, block: Any, x: Tensor, e: int) -> tuple[Tensor, Tensor]:
    """Expert e's neurons ``[token, d_expert]`` and output ``[token, d_out]`` for its input ``x``."""
    if name == "jetmoe":
        gate, up = (x @ block.input_linear.weight[e].T).chunk(2, -1)
        neurons = nn.functional.silu(gate) * up
        return neurons, neurons @ block.output_linear.weight[e].T
    stack = block.experts
    if name == "switch_transformers":
        module = stack[f"expert_{e}"]
        neurons = torch.relu(x @ module.wi.weight.T)
        return neurons, neurons @ module.wo.weight.T
    if name == "nemotron_h":
        neurons = torch.relu(x @ stack.up_proj[e].T) ** 2
        return neurons, neurons @ stack.down_proj[e].T
    if name == "gpt_oss":
        both = x @ stack.gate_up_proj[e] + stack.gate_up_proj_bias[e]
        gate, up = both[:, 0::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
        neurons = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return neurons, neurons @ stack.down_proj[e] + stack.down_proj_bias[e]
    if name.startswith("llama4"):
        gate, up = (x @ stack.gate_up_proj[e]).chunk(2, -1)
        neurons = nn.functional.silu(gate) * up
        return neurons, neurons @ stack.down_proj[e]
    gate, up = (x @ stack.gate_up_proj[e].T).chunk(2, -1)
    if name == "deepseek_v4":
        gate, up = gate.clamp(max=10.0), up.clamp(-10.0, 10.0)
    gate = nn.functional.gelu(gate, approximate="tanh") if name.startswith("gemma4") else nn.functional.silu(gate)
    neurons = gate * up
    return neurons, neurons @ stack.down_proj[e].T


@dataclass
class Reference:
    """A forward pass of the untouched model with one layer's routed part computed by hand.

    ``neurons`` ``[token, expert, d_expert]`` and ``outputs`` ``[token, expert, d_model]`` are those of all experts;
    ``routed`` ``[token, d_model]`` is what the layer adds; ``router_logits`` and ``weights`` ``[token, expert]``.
    """

    logits: Tensor
    router_logits: Tensor
    weights: Tensor
    neurons: Tensor
    outputs: Tensor
    routed: Tensor


@torch.no_grad()
def run(
    hf: nn.Module, name: str, tokens: Tensor, label: tiny.Label, weights_of: Callable[[Tensor], Tensor]
) -> Reference:
    """Run with one layer's experts weighted by ``weights_of(router logits)``, a matrix ``[token, expert]``."""
    layer, found = tiny.native_layers(hf)[label], {}

    def read_logits(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found["logits"] = tiny.raw_logits(layer, args[0].reshape(-1, args[0].shape[-1]))

    def replace(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        x = args[0].reshape(-1, args[0].shape[-1])
        matrix = found["weights"] = weights_of(found["logits"])
        on_input = name.startswith("llama4")
        per_expert = [expert(name, layer.block, x * matrix[:, [e]] if on_input else x, e) for e in range(8)]
        neurons, outputs = (torch.stack(parts, 1) for parts in zip(*per_expert))
        routed = (outputs if on_input else outputs * matrix.unsqueeze(-1)).sum(1)
        found.update(
            neurons=neurons, outputs=_widened(name, layer.block, outputs), routed=_widened(name, layer.block, routed)
        )
        if name.startswith("llama4"):
            return layer.block.shared_expert(x) + routed, output[1]
        if name == "jetmoe":
            return routed.view(output.shape) + layer.block.bias
        if name == "laguna":  # the block applies its scale itself
            return routed / 1.5
        return routed.view(output.shape)

    handles = [
        layer.linear.register_forward_pre_hook(read_logits),
        (layer.block if name in BLOCK_OUTPUT else layer.experts).register_forward_hook(replace),
    ]
    try:
        logits = tiny.native_logits(hf, name, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return Reference(logits, found["logits"], found["weights"], found["neurons"], found["outputs"], found["routed"])


def _widened(name: str, block: Any, latent: Tensor) -> Tensor:
    """Nemotron-H: from the experts' latent width to d_model."""
    return latent @ block.fc2_latent_proj.weight.T if name == "nemotron_h" else latent
