"""Patch one expert's output, for the tokens that use it.

    python examples/03_patch_expert_output.py

Claim: silencing an expert at hook_expert_out does what setting its weight to zero does, and only where it ran.
"""

import torch
from tiny_model import random_tokens, tiny_bridge

import moe_interp as mi

moe = mi.attach(tiny_bridge())
tokens, layer = random_tokens(2, 8), 2

with torch.no_grad():
    natural, cache = moe.bridge.run_with_cache(tokens, names_filter=moe.filter("expert_indices"))
    expert = int(cache["expert_indices", layer].flatten().mode().values)  # the most used
    used = cache["expert_indices", layer] == expert  # [batch, pos, slot]

    def silence(out, hook):
        return out.masked_fill(used.unsqueeze(-1), 0.0)  # [batch, pos, slot, d_model]

    def no_weight(weights, hook):
        return weights.masked_fill(used, 0.0)

    silenced = moe.bridge.run_with_hooks(tokens, fwd_hooks=[(moe.hook_name("expert_out", layer), silence)])
    unweighted = moe.bridge.run_with_hooks(tokens, fwd_hooks=[(moe.hook_name("expert_weights", layer), no_weight)])

moved = (silenced - natural).abs().amax(dim=-1)
runs = used.any(dim=-1)
print(f"expert {expert} of layer {layer} runs for {int(runs.sum())} of {runs.numel()} tokens")
print(f"largest change of the logits where it runs: {float(moved[runs].max()):.3f}")
print(f"largest change elsewhere:                   {float(moved[~runs].max()):.1e}")
assert runs.any()
assert (moved[runs] > 1e-3).all()
assert (moved[~runs] < 1e-5).all(), "this is the last layer: other tokens cannot change"
assert torch.allclose(silenced, unweighted, atol=1e-5)
