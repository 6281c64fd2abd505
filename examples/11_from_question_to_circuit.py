"""From a question to the experts that answer it: sweep, attribution, tracing, steering, on one set of prompts.

    python examples/11_from_question_to_circuit.py

Question: where does the demo model keep what people like to eat? Claim: a few experts carry it, found by three methods
that do not share an assumption, and without them the answers are gone, while as many random experts cost less.
"""

import torch

import moe_interp as mi

torch.set_num_threads(1)
moe, items = mi.load_demo()
tokenizer = moe.bridge.tokenizer


def first_token(text):
    return tokenizer(text, add_special_tokens=False)["input_ids"][0]


# 1. prompts that differ in the person alone, which the model answers right; half of them to look, half to test
prompts = []
for item in items["facts"]:
    tokens = moe.bridge.to_tokens(item.prompt)
    if "like to eat" in item.prompt and tokens.shape[1] == 12:
        with torch.no_grad():
            if int(moe.bridge(tokens)[0, -1].argmax()) == first_token(item.answer):
                prompts.append((item, tokens))
look, test = prompts[::2][:16], prompts[1::2][:16]
clean = torch.cat([tokens for _, tokens in look])
right = torch.tensor([first_token(item.answer) for item, _ in look])
shift = next(n for n in range(1, len(right)) if not (right.roll(n) == right).any())
corrupted, wrong = clean.roll(shift, dims=0), right.roll(shift)
print(f"{len(look)} prompts such as {tokenizer.decode(clean[0, 1:])!r}, each against another person's")


def metric(logits):
    """Logit of the clean prompt's answer minus that of the corrupted prompt's, [example]."""
    row = torch.arange(len(logits))
    return logits[row, -1, right] - logits[row, -1, wrong]


# 2. sweep: which experts are enough to move the answer?
with torch.no_grad():
    clean_logits, cache = moe.bridge.run_with_cache(clean)
sweep = mi.patching.expert_out(
    moe, corrupted, cache, metric, quantity="contribution", clean_logits=clean_logits, progress=False
)
print(f"\nSWEEP\n{sweep.summary()}")
restored = sweep.normalized()
by_sweep = {(int(row.layer), int(row.expert)) for row in sweep.top(4).itertuples() if row.mean > 0}

# 3. attribution: at which of the prompt's tokens? One gradient for all cells, checked against exact patching
estimates = mi.patching.attribution(moe, clean, corrupted, metric, progress=False)
print(f"\nATTRIBUTION\n{estimates.summary()}")

# 4. direct or through later layers? What each expert writes to the logits itself
direct = mi.patching.logit_attribution(moe, clean, right, wrong)
print(f"\nDIRECT\n{direct.summary()}")

# 5. tracing: noise on the name, one expert restored at a time. No other prompt is involved
example = torch.arange(len(clean))
trace = mi.patching.trace_experts(
    moe, clean, [3, 4], lambda logits: logits[:, -1].log_softmax(-1)[example, right], draws=2
)
print(f"\nTRACING\n{trace.summary()}")
recovered = trace.recovered().to_series()
cells = recovered[[cell for cell in recovered.index if "expert" in cell]].sort_values(ascending=False)
by_tracing = {(int(cell.split()[0]), int(cell.split()[2])) for cell in cells.index[:4]}
circuit = sorted(by_sweep & by_tracing)
print(f"\namong the four largest of both sweep and tracing: {circuit}")

# 6. are they needed? Suppressed while other people's questions are answered, beside as many random experts
experts = {}
for layer, expert in circuit:
    experts.setdefault(layer, []).append(expert)
answers = {item.id: item.answer for item, _ in test}
effect = mi.steering_effect(
    moe,
    experts,
    prompts=[item for item, _ in test],
    metric=lambda completion: completion.text.startswith(answers[completion.prompt]),
    held_out=[item for domain in items for item in items[domain][100:106]],
    random_draws=4,
    max_new_tokens=4,
    progress=False,
)
print(f"\nSTEERING\n{effect.summary()}")
assert circuit
assert float(restored.max()) > 0.2
table = effect.effects().set_index(["measure", "domain"])
assert table.loc[("metric", "all"), "effect"] < 0
