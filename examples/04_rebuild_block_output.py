"""Cache the experts' outputs with run_with_cache, and rebuild the block's output from them.

    python examples/04_rebuild_block_output.py

Claim: the weighted sum of expert_out over the slots is routed_out, which is what the MoE block adds.
"""

import torch
from tiny_model import random_tokens, tiny_bridge

import moe_interp as mi

moe = mi.attach(tiny_bridge())
tokens = random_tokens(2, 8)


def wanted(name):
    ours = moe.filter("expert_out", "expert_weights", "expert_indices", "routed_out")
    return ours(name) or name.endswith("hook_mlp_out")


with torch.no_grad():
    _, cache = moe.bridge.run_with_cache(tokens, names_filter=wanted)

for layer in moe.layers:
    out, weights = cache["expert_out", layer], cache["expert_weights", layer]
    rebuilt = (out * weights.unsqueeze(-1)).sum(dim=-2)
    error = (rebuilt - cache["mlp_out", layer]).abs().max()
    size = cache["mlp_out", layer].abs().max()
    print(f"layer {layer}: expert_out {tuple(out.shape)}, largest difference {error:.1e} of {size:.2f}")
    assert error <= 5e-6 * size
    assert torch.allclose(rebuilt, cache["routed_out", layer], atol=1e-5)
