"""Which experts carry a fact? Activation patching over routers and experts, exactly and by one gradient.

    python examples/07_patching.py

Claim: patched from a prompt about one person into a prompt about another, few experts move the answer; attribution
finds them at the cost of three passes.
"""

import torch

import moe_interp as mi

torch.set_num_threads(1)
moe, items = mi.load_demo()


def first_token(text):
    return moe.bridge.tokenizer(text, add_special_tokens=False)["input_ids"][0]


# pairs of questions that differ in the person, of the same length, each answered by the model
pairs, waiting = [], {}
for item in items["facts"]:
    tokens, answer = moe.bridge.to_tokens(item.prompt), first_token(item.answer)
    words = item.prompt.split()
    kind = (tokens.shape[1], words[0], words[-3])
    with torch.no_grad():
        if int(moe.bridge(tokens)[0, -1].argmax()) != answer:
            continue
    other = waiting.pop(kind, None)
    if other is None or other[1] == answer:
        waiting[kind] = (tokens, answer)
    else:
        pairs.append((*other, tokens, answer))
length = max({clean.shape[1] for clean, *_ in pairs}, key=lambda n: sum(p[0].shape[1] == n for p in pairs))
pairs = [pair for pair in pairs if pair[0].shape[1] == length][:16]
clean, corrupted = (torch.cat([pair[part] for pair in pairs]) for part in (0, 2))
right, wrong = (torch.tensor([pair[part] for pair in pairs]) for part in (1, 3))
print(f"{len(pairs)} pairs of {length} tokens, such as {moe.bridge.to_string(clean[0])!r}")
print(f"                      and {moe.bridge.to_string(corrupted[0])!r}")


def metric(logits):
    """Logit of the clean prompt's answer minus that of the corrupted prompt's, [example]."""
    row = torch.arange(len(logits))
    return logits[row, -1, right] - logits[row, -1, wrong]


# exactly: each expert's contribution from the clean run, one expert at a time, at all positions
with torch.no_grad():
    clean_logits, cache = moe.bridge.run_with_cache(clean)
experts = mi.patching.expert_out(
    moe, corrupted, cache, metric, quantity="contribution", clean_logits=clean_logits, progress=False
)
print(f"\n{experts.summary()}")
print(experts.top(5).to_string(index=False))

# is it the choice of experts, at one token? the clean run's router logits, one position at a time
routers = mi.patching.router_logits(moe, corrupted, cache, metric, clean_logits=clean_logits, progress=False)
print(f"\n{routers.summary()}")
share = float(experts.normalized().max())
print(
    f"\nthe best expert restores {share:.0%} of the difference, the best router {float(routers.normalized().max()):.0%}"
)

# the same for every expert at every position, to first order
estimates = mi.patching.attribution(moe, clean, corrupted, metric, progress=False)
print(f"\n{estimates.summary()}")
found = set(map(tuple, estimates.by_expert().head(10)[["layer", "expert"]].to_numpy().tolist()))
exact = set(map(tuple, experts.top(10)[["layer", "expert"]].to_numpy().tolist()))
print(f"of the ten largest experts by exact patching, attribution finds {len(found & exact)}")
assert len(found & exact) >= 6

# one cell again by hand, with run_with_hooks alone
layer, expert = (int(experts.top(1).iloc[0][axis]) for axis in ("layer", "expert"))
with torch.no_grad():
    _, own = moe.bridge.run_with_cache(corrupted)

    def contribution(run):
        used = run["expert_indices", layer] == expert  # [batch, pos, slot]
        return (run["expert_out", layer] * (run["expert_weights", layer] * used).unsqueeze(-1)).sum(dim=2)

    change = contribution(cache) - contribution(own)
    patch = (moe.hook_name("routed_out", layer), lambda value, hook: value + change)
    by_hand = metric(moe.bridge.run_with_hooks(corrupted, fwd_hooks=[patch]))
swept = torch.as_tensor(experts.data["value"].sel(layer=layer, expert=expert).values)
print(f"layer {layer}, expert {expert} by hand: largest difference to the sweep {(by_hand - swept).abs().max():.1e}")
assert (by_hand - swept).abs().max() < 1e-4
