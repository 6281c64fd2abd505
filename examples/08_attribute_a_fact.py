"""Which experts write a fact, through what, and which carry it? Five views of the same prompts.

    python examples/08_attribute_a_fact.py

Claim: contributions add up to the logit difference; the expert that writes most of it towards the answer also brings
most of it back when the subject is noised; restoring its whole layer brings back nearly all.
"""

import torch

import moe_interp as mi

torch.set_num_threads(1)
moe, items = mi.load_demo()
tokenizer = moe.bridge.tokenizer


def first_token(text):
    return tokenizer(text, add_special_tokens=False)["input_ids"][0]


# questions of one form and length that the model answers right: "What does NAME SURNAME like to eat?"
chosen = []
for item in items["facts"]:
    tokens = moe.bridge.to_tokens(item.prompt)
    if "like to eat" in item.prompt and tokens.shape[1] == 12 and len(chosen) < 8:
        with torch.no_grad():
            if int(moe.bridge(tokens)[0, -1].argmax()) == first_token(item.answer):
                chosen.append((tokens, first_token(item.answer)))
tokens = torch.cat([prompt for prompt, _ in chosen])
right = torch.tensor([answer for _, answer in chosen])
wrong = next(right.roll(n) for n in range(1, len(right)) if not (right.roll(n) == right).any())
subject = [3, 4]  # the two parts of the name
print(f"{len(tokens)} prompts such as {tokenizer.decode(tokens[0, 1:])!r}")

# what is written directly towards the right answer instead of another person's
attribution = mi.patching.logit_attribution(moe, tokens, right, wrong)
print(attribution.summary())
assert abs(attribution.remainder()).max() < 1e-4

# what these experts write in general
writes = mi.patching.expert_tokens(moe, tokens, k=5)
writer = attribution.experts().iloc[0]
table = writes.table()
print(table[(table.layer == writer.layer) & (table.expert == writer.expert)].to_string(index=False))

# from another person's prompt to this one: which experts, their weights, or what they compute?
names = ("router_in", "router_logits", "expert_indices", "expert_weights")
with torch.no_grad():
    _, cache = moe.bridge.run_with_cache(tokens, names_filter=moe.filter(*names))
corrupted, example = tokens.roll(1, dims=0), torch.arange(len(tokens))


def answer_logp(logits):
    return logits[:, -1].log_softmax(-1)[example, right]


split = mi.patching.decompose(moe, corrupted, cache, answer_logp)
print(split.summary())

# which earlier experts does the writer's router read?
paths = mi.patching.path_patching(moe, tokens, targets=[int(writer.layer)], positions=[-1])
print(paths.summary())

# and which experts carry the fact, when noise is added to the name?
trace = mi.patching.trace_experts(moe, tokens, subject, answer_logp, draws=2)
print(trace.summary())
recovered = trace.recovered().to_series()
best = recovered[[cell for cell in recovered.index if "expert" in cell]].idxmax()
assert best == f"{writer.layer:.0f} expert {writer.expert:.0f}"
assert recovered[f"layer {writer.layer:.0f}"] > 0.9
