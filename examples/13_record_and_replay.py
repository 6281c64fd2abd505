"""Record the routing of a model to disk, read it part by part, and replay it.

    python examples/13_record_and_replay.py

Claim: a replayed recording gives the very logits of the run that it was recorded from.
"""

import tempfile
from pathlib import Path

import torch

import moe_interp as mi

torch.set_num_threads(1)
moe, items = mi.load_demo()
some = {domain: group[:4] for domain, group in items.items()}

with tempfile.TemporaryDirectory() as folder:
    # parts of whole sequences; the same call goes on after an interruption
    recorded = mi.capture_routing(
        moe, some, out=Path(folder) / "routes", batch_size=1, part_bytes=2**14, progress=False
    )
    print(recorded.summary())
    for part in mi.traces.read_parts(recorded.path):
        print(" ", part)
    trace = recorded.read()

# every sequence alone, as it was recorded: routes and weights are written back
for number in range(len(trace.sequence_lengths)):
    one = trace.select(trace.sequence == number)
    tokens = torch.from_numpy(one.token_ids)[None]
    with torch.no_grad():
        plain = moe.bridge(tokens)
        replayed = moe.bridge.run_with_hooks(tokens, fwd_hooks=mi.replay_routes(moe, one))
    assert float((replayed - plain).abs().max()) == 0.0, "a replay is exact"
print(f"{number + 1} sequences replayed: logits differ by 0.0")

# routes while the model writes, against those of the same text read at once
grown = mi.capture_routing(moe, ["Gus has 3 coins."], generate=8, progress=False)
whole = mi.capture_routing(moe, [grown.token_ids], progress=False)
assert (grown.expert_indices == whole.expert_indices).all()
n_new = int((grown.phase == "generation").sum())
print(f"{n_new} generated tokens took the routes that the finished text takes")

# of a corpus of any size, counts alone
counts = mi.capture_routing(moe, some, accumulate=["co_activation"], batch_size=1, progress=False)
assert (counts.slots.sum(axis=0) == trace.counts()[0]).all()
print(counts)
