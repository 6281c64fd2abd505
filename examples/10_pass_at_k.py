"""How often is one of K completions right, and does an intervention change it?

    python examples/10_pass_at_k.py

Claim: completions belong to their seeds, so that two runs are compared problem by problem.
"""

import torch

import moe_interp as mi

torch.set_num_threads(1)
moe, items = mi.load_demo()
problems = [
    {"id": item.id, "prompt": item.fields["question"], "answer": item.fields["final_answer"]}
    for item in items["arithmetic"]
    if item.fields["steps"] == 1
][:8]
options = {"n_samples": 8, "ks": (1, 4, 8), "temperature": 1.0, "max_new_tokens": 24, "progress": False}
natural = mi.evaluate_pass_at_k(moe, problems, **options)
print(natural.summary())
print(natural.by_problem().to_string(index=False))

# the same problems and draws, with random routes at the last layer, in the prompt and in what is generated
hooks = mi.random_routing(moe, layers=[moe.layers[-1]], positions="all")
random = mi.evaluate_pass_at_k(moe, problems, hooks=hooks, **options)
print("\nrandom routes at the last layer, against natural routing:")
print(random.compare(natural).to_string(index=False))

# the estimate by hand: 1 - C(n - c, k) / C(n, k)
counts = natural.by_problem()
assert (natural.data["pass_at_k"].sel(k=4).values == mi.pass_at_k(8, counts["c"].to_numpy(), 4)).all()
again = mi.evaluate_pass_at_k(moe, problems[:2], batch_size=3, **options)
assert again.by_problem()["c"].tolist() == counts["c"][:2].tolist(), "completions do not depend on the batch"
