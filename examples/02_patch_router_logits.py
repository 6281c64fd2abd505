"""Patch router logits and see the route change.

    python examples/02_patch_router_logits.py

Claim: an edit of hook_router_logits re-routes the token by the model's own rule, selection and weights.
"""

import torch
from tiny_model import random_tokens, tiny_bridge

import moe_interp as mi

moe = mi.attach(tiny_bridge())
tokens, layer, pos, expert = random_tokens(1, 6), 1, 3, 6


def want_expert(logits, hook):
    logits[:, pos, expert] += 10.0  # in place, so nothing needs to be returned


patch = [(moe.hook_name("router_logits", layer), want_expert)]
read = moe.filter("router_logits", "expert_indices", "expert_weights", layers=[layer])
with torch.no_grad():
    natural, before = moe.bridge.run_with_cache(tokens, names_filter=read)
    with moe.bridge.hooks(fwd_hooks=patch):
        patched, after = moe.bridge.run_with_cache(tokens, names_filter=read)

print(f"experts at pos {pos} before: {before['expert_indices', layer][0, pos].tolist()}")
print(f"experts at pos {pos} after:  {after['expert_indices', layer][0, pos].tolist()}")
print(f"weights at pos {pos} after:  {[round(w, 3) for w in after['expert_weights', layer][0, pos].tolist()]}")
moved = (patched - natural).abs().amax(dim=-1)[0]
print(f"largest change of the logits, by position: {[round(m, 3) for m in moved.tolist()]}")

indices, weights = moe.spec(layer).rule.route(after["router_logits", layer])
assert expert not in before["expert_indices", layer][0, pos]
assert after["expert_indices", layer][0, pos, 0] == expert
assert torch.equal(indices, after["expert_indices", layer])
assert torch.equal(weights, after["expert_weights", layer])
assert moved[pos] > 1e-3
assert moved[:pos].max() < 1e-5, "positions before the patch cannot change"
