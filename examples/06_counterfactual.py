"""Would other experts have predicted the next token better? Exact, for every token and layer.

    python examples/06_counterfactual.py

Claim: the best of many routes beats the standard one on many tokens; controls say how much of that is luck.
"""

import torch

import moe_interp as mi

torch.set_num_threads(1)
moe, items = mi.load_demo()
# the worked solution of a problem: the question is read, only the solution's tokens are scored
solutions = [
    {"id": item.id, "prompt": item.fields["question"], "answer": item.fields["solution"]}
    for item in items["arithmetic"][:12]
]
result = mi.counterfactual_routes(moe, solutions, n_routes=16, progress=False)
print(result.summary())

print("\nwhere another route would have helped most:")
tokens = result.token_table().nlargest(5, "gap")
print(tokens[["sequence", "target_text", "layer", "p_standard", "p_best", "standard_route", "best_route"]].to_string())

controls = result.controls().set_index("kind")
assert controls.loc["router", "regret"] > controls.loc["null", "regret"]
# the same token again, by hand: the best route at that layer, everything else as it was
place = tokens.iloc[0]
item = next(item for item in items["arithmetic"] if item.id == place["sequence"])
question = moe.bridge.to_tokens(item.fields["question"])
solution = moe.bridge.tokenizer(item.fields["solution"], add_special_tokens=False)["input_ids"]
ids = torch.cat([question, torch.tensor([solution])], dim=1)
route = torch.tensor([int(expert) for expert in place["best_route"].split()])
with torch.no_grad():
    hooks = mi.set_routes(moe, int(place["layer"]), route, positions=[int(place["pos"])])
    logits = moe.bridge.run_with_hooks(ids, fwd_hooks=hooks)
p = float(logits[0, int(place["pos"])].softmax(-1)[ids[0, int(place["pos"]) + 1]])
print(f"\nby hand with set_routes: {p:.4f}, by branches: {place['p_best']:.4f}")
assert abs(p - place["p_best"]) < 1e-4
