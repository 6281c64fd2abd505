"""Samples per second of pass@K, against transformers' own ``generate`` in the same batch and number format.

    python benchmarks/pass_at_k.py [--samples 32] [--problems 4] [--batch 64] [--new 60]

Both draw the same number of completions of the same problems of the demo model, by temperature .6 and top-p .95, with
rows of one prompt length in one batch; the best of several runs each, taken in turns. On a CPU one thread's processor
time counts, which other work on the machine lengthens little; on a GPU time on the clock.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import moe_interp as mi
from moe_interp.testbed.demo import load_demo_assets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--new", type=int, default=60, help="new tokens of a completion at most")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    now = time.process_time if given.device == "cpu" else time.perf_counter
    if given.device == "cpu":
        torch.set_num_threads(1)
    moe, items = mi.load_demo()
    dtype = getattr(torch, given.dtype)
    bridge = moe.bridge
    bridge.to(given.device).to(dtype)
    path = str(load_demo_assets().model_path)
    hf: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(given.device)
    read = [(item, bridge.to_tokens(str(item.fields["question"]))) for item in items["arithmetic"]]
    length = max({ids.shape[1] for _, ids in read}, key=lambda n: sum(ids.shape[1] == n for _, ids in read))
    chosen = [(item, ids) for item, ids in read if ids.shape[1] == length][: given.problems]
    problems = [
        {"id": item.id, "prompt": item.fields["question"], "answer": item.fields["final_answer"]} for item, _ in chosen
    ]
    rows = torch.cat([ids.expand(given.samples, -1) for _, ids in chosen]).to(given.device)
    common = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": given.new}

    def ours() -> None:
        mi.evaluate_pass_at_k(
            moe, problems, n_samples=given.samples, ks=(1,), batch_size=given.batch, progress=False, **common
        )

    def theirs() -> None:
        for start in range(0, len(rows), given.batch):
            part = rows[start : start + given.batch]
            mask = torch.ones_like(part)
            ids = hf.generate(part, attention_mask=mask, do_sample=True, top_k=0, pad_token_id=0, **common)
            bridge.tokenizer.batch_decode(ids[:, part.shape[1] :], skip_special_tokens=True)

    taken: dict[str, list[float]] = {"moe_interp": [], "transformers": []}
    ways: list[tuple[str, Callable[[], None]]] = [("moe_interp", ours), ("transformers", theirs)]
    for _ in range(given.rounds):
        for name, way in ways:
            start = now()
            way()
            taken[name].append(now() - start)
    rates = {name: len(rows) / min(times) for name, times in taken.items()}
    print(
        f"{len(rows)} completions of {len(chosen)} problems of {length} tokens, at most {given.new} new, "
        f"batch {given.batch}, {given.dtype} on {given.device}"
    )
    for name, rate in rates.items():
        print(f"{name:12s} {rate:8.1f} samples a second")
    print(f"ratio {rates['moe_interp'] / rates['transformers']:.2f}")


if __name__ == "__main__":
    main()
