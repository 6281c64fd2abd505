"""Which experts do two sets of prompts differ in, and what happens without them?

    python examples/09_contrast_and_steer.py

Claim: the demo model's questions about facts have experts of their own; without them its answers about facts are gone,
and as many random experts cost far less.
"""

import torch

import moe_interp as mi

torch.set_num_threads(1)
moe, items = mi.load_demo()
contrast = mi.contrast_experts(moe, items["facts"][:24], items["code"][:24], progress=False)
print(contrast.summary())

# the six with the largest differences, on questions and texts that had no part in finding them
experts = contrast.found("a", most=6)
questions = items["facts"][100:130]
answers = {item.id: item.answer for item in questions}
held_out = [item for domain in items for item in items[domain][100:112]]
effect = mi.steering_effect(
    moe,
    experts,
    prompts=questions,
    metric=lambda completion: completion.text.startswith(answers[completion.prompt]),
    held_out=held_out,
    random_draws=4,
    max_new_tokens=4,
    progress=False,
)
print("\n" + effect.summary())

table = effect.effects().set_index(["measure", "domain"])
assert table.loc[("metric", "all"), "excess_verdict"] == "lower"  # fewer right answers than with random experts
assert table.loc[("loss", "facts"), "effect"] > 2 * table.loc[("loss", "code"), "effect"]
