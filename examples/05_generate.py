"""Use interventions under generate, with the key-value cache.

    python examples/05_generate.py

Claim: an intervention acts on the prompt, on what is generated, or on both, as its `positions` say.
"""

import torch
from tiny_model import random_tokens, tiny_bridge

import moe_interp as mi

moe = mi.attach(tiny_bridge())
tokens, layer, expert = random_tokens(1, 6), 1, 7


def generated(fwd_hooks):
    """Token ids of the prompt and 8 more, and the experts of the layer in every step."""
    seen = []
    reader = (moe.hook_name("expert_indices", layer), lambda indices, hook: seen.append(indices.clone()))
    with torch.no_grad(), moe.bridge.hooks(fwd_hooks=[*fwd_hooks, reader]):
        ids = moe.bridge.generate(tokens, max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False)
    return ids, seen


natural, free = generated([])
for positions in (None, "new", "all"):
    ids, steps = generated(mi.force_experts(moe, layer, expert, positions=positions))
    forced = [bool((step[..., 0] == expert).all()) and step.shape[-1] == 1 for step in steps]
    where = [step for step, is_forced in enumerate(forced) if is_forced]
    print(f"positions={positions!s:5}: forced in steps {where}, wrote {ids[0, 6:].tolist()}")
    prompt, later = forced[0], forced[1:]
    assert prompt == (positions in (None, "all"))
    assert all(later) == (positions in ("new", "all"))

assert [step.shape[1] for step in free] == [6, 1, 1, 1, 1, 1, 1, 1], "one position a step: the cache is in use"
again, _ = generated([])
assert torch.equal(again, natural), "nothing is left behind"
print(f"nothing forced : wrote {natural[0, 6:].tolist()}")
