"""Read the routing of a batch with padding, token by token.

    python examples/01_read_routing.py

Claim: activations are [batch, pos, ...], and padding on the left changes nothing at the real tokens. First the routing
of one prompt at a glance, as `moe.show` prints it.
"""

import torch
from tiny_model import random_tokens, tiny_bridge

import moe_interp as mi

moe = mi.attach(tiny_bridge())
long, short = random_tokens(1, 8), random_tokens(1, 5, seed=1)
print(moe.show(long), "\n")  # in a notebook, moe.show(...) alone as the last line of a cell

tokens = torch.cat([long, torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1)])  # 0 is the padding
mask = (tokens != 0).long()

wanted = moe.filter("router_logits", "expert_indices", "expert_weights")
_, cache = moe.bridge.run_with_cache(tokens, attention_mask=mask, names_filter=wanted)
_, alone = moe.bridge.run_with_cache(short, names_filter=wanted)

layer = moe.layers[1]
indices, weights = cache["expert_indices", layer], cache["expert_weights", layer]
print(f"layer {layer}: experts (and weights) of the padded prompt")
for pos in range(tokens.shape[1]):
    route = ", ".join(f"{int(e)} ({float(w):.2f})" for e, w in zip(indices[1, pos], weights[1, pos]))
    print(f"  pos {pos}: {route if mask[1, pos] else 'padding'}")

for each in moe.layers:
    assert torch.equal(cache["expert_indices", each][1, 3:], alone["expert_indices", each][0])
    assert torch.allclose(cache["router_logits", each][1, 3:], alone["router_logits", each][0], atol=1e-5)
print("the padded prompt is routed as the same prompt alone")
