"""Can the router be taught the better routes, and are sampled answers better for it? Measured before and after.

    python examples/12_tune_and_measure.py

Claim: tuning one router is measured three ways on problems that it was not tuned on: next tokens, regret, answers. The
run of more problems and three seeds is benchmarks/tuning_study.py, its figures are in docs/tuning-study.md.
"""

import torch

import moe_interp as mi
from moe_interp.testbed.domains.arithmetic import arithmetic

torch.set_num_threads(1)
moe, items = mi.load_demo()
last = moe.layers[-1]
# to measure on: problems of two steps, which the model solves in part
graded = [item for item in items["arithmetic"] if item.fields["steps"] == 2][:10]
problems = [
    {"id": item.id, "prompt": item.fields["question"], "answer": item.fields["final_answer"]} for item in graded
]
solved = [{"id": item.id, "prompt": item.fields["question"], "answer": item.fields["solution"]} for item in graded]
# to tune on: solutions of other computations, which the model was not trained on either
texts = [text.split("\n", 1) for text in arithmetic(n_train=1, n_items=1, n_validation=120).validation]
solutions = [{"id": f"tuned-{i}", "prompt": f"{text[0]}\n", "answer": text[1]} for i, text in enumerate(texts)]


def measure() -> tuple[mi.CounterfactualResult, mi.PassAtKResult]:
    routes = mi.counterfactual_routes(moe, solved, layers=[last], n_routes=16, progress=False)
    options = {"n_samples": 8, "ks": (1, 4), "temperature": 0.6, "max_new_tokens": 32, "progress": False}
    return routes, mi.evaluate_pass_at_k(moe, problems, is_correct="number", **options)


routes_before, answers_before = measure()
tuned = mi.tune_router(moe, solutions, objective="epo", layer=last, n_routes=16, progress=False)
tuned.apply(moe)
routes_after, answers_after = measure()
tuned.revert(moe)

print(tuned.summary())
print(f"\nRegret at layer {last}, nats, on solutions of problems that the router was not tuned on:")
for name, result in (("before", routes_before), ("after", routes_after)):
    row = result.by_layer().iloc[0]
    print(f"  {name:6s} {row['regret']:.4f} [{row['regret_low']:.4f}, {row['regret_high']:.4f}]")
print("\nSampled answers, after against before, by problem:")
print(answers_after.compare(answers_before).round(3).to_string(index=False))
print("\nWith so few problems and one seed, only a large change could be told from none.")

# the router is back as it was: the same scores again
again = mi.counterfactual_routes(moe, solved, layers=[last], n_routes=16, progress=False)
assert again.data["logp_standard"].equals(routes_before.data["logp_standard"])
assert not routes_after.data["logp_standard"].equals(routes_before.data["logp_standard"])
