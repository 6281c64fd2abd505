"""Patching sweeps against loops of run_with_hooks in their best batches, and attribution in units of a forward.

    python benchmarks/patching.py [--threads 1] [--examples 8] [--tokens 24] [--repeats 3]

All ways patch the same cells in one process, taking turns, the best of --repeats. The loop runs batches of copies of
the batch, each copy with its own cell patched, in several sizes; some cells are timed and the rest counted, since a
forward costs the same whatever it patches. The sweep is timed whole, with its plain pass and its check. On one thread
times are processor time. The prompts of a pair differ in a few tokens in their first half, as prompts for patching do.

Where the sweep's time goes: passes begin at the patched layer (half of the layers on average), at the first changed
position, for the examples that a cell changes; cells that change nothing take none. What is left is that part of the
layers above, and the metric.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import OlmoeConfig, OlmoeForCausalLM

import moe_interp as mi

LAYERS, D_MODEL, EXPERTS, TOP_K, D_EXPERT, VOCAB = 8, 256, 32, 4, 256, 8192
SUBJECT = 3  # tokens that differ
COPIES = (1, 4, 16)


def build(n_pos: int) -> mi.MoEHooks:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=D_EXPERT,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=n_pos,
    )
    model = OlmoeForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.1)
    return mi.attach(build_bridge_from_module(model, "OlmoeForCausalLM", hf_config=config))


def pairs(n_examples: int, n_pos: int) -> tuple[Tensor, Tensor]:
    """Clean and corrupted tokens ``[example, pos]``."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(1, VOCAB, (n_examples, n_pos), generator=generator)
    corrupted = clean.clone()
    starts = torch.randint(1, max(2, n_pos // 2 - SUBJECT), (n_examples,), generator=generator)
    for row, start in enumerate(starts.tolist()):
        corrupted[row, start : start + SUBJECT] = torch.randint(1, VOCAB, (SUBJECT,), generator=generator)
    return clean, corrupted


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 7]


def expert_cells(moe: mi.MoEHooks, cache: Any, routes: Any) -> tuple[list[Any], Callable[[int, list[Any]], Any]]:
    """The cells (layer, expert), and the hook that patches one in each copy of the batch."""
    aligned = {}
    for layer in moe.layers:
        theirs, ours = routes["expert_indices", layer], cache["expert_indices", layer]
        same = theirs.unsqueeze(-1) == ours.unsqueeze(-2)
        place = same.long().argmax(-1, keepdim=True).expand(-1, -1, -1, D_MODEL)
        aligned[layer] = (theirs, same.any(-1), cache["expert_out", layer].gather(2, place))

    def hook(layer: int, experts: list[Any]) -> Any:
        theirs, matched, clean = aligned[layer]
        where = torch.cat([(theirs == expert) & matched for expert in experts]).unsqueeze(-1)
        values = clean.repeat(len(experts), 1, 1, 1)
        return moe.hook_name("expert_out", layer), lambda out, hook: torch.where(where, values, out)

    return [(layer, expert) for layer in moe.layers for expert in range(EXPERTS)], hook


def router_cells(moe: mi.MoEHooks, cache: Any) -> tuple[list[Any], Callable[[int, list[Any]], Any]]:
    """The cells (layer, pos), and the hook that patches one in each copy of the batch."""
    n_pos = cache["router_logits", 0].shape[1]

    def hook(layer: int, positions: list[Any]) -> Any:
        clean = cache["router_logits", layer]

        def write(logits: Tensor, hook: Any) -> Tensor:
            for part, pos in zip(logits.view(len(positions), *clean.shape), positions):
                part[:, pos] = clean[:, pos]
            return logits

        return moe.hook_name("router_logits", layer), write

    return [(layer, pos) for layer in moe.layers for pos in range(n_pos)], hook


def loop(moe: mi.MoEHooks, tokens: Tensor, cells: list[Any], hook: Any, copies: int) -> Tensor:
    """``[cell, example]`` by run_with_hooks on so many copies of the batch; cells of a pass are of one layer."""
    found = []
    for layer in dict.fromkeys(layer for layer, _ in cells):
        places = [place for where, place in cells if where == layer]
        for start in range(0, len(places), copies):
            some = places[start : start + copies]
            logits = moe.bridge.run_with_hooks(tokens.repeat(len(some), 1), fwd_hooks=[hook(layer, some)])
            found += [metric(part) for part in logits.split(len(tokens))]
    return torch.stack(found)


def best(function: Callable[[], object], clock: Callable[[], float], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = clock()
        function()
        times.append(clock() - start)
    return min(times)


class Comparison:
    """Times a sweep beside the loops on the same cells, and prints both."""

    def __init__(self, moe: mi.MoEHooks, tokens: Tensor, cache: Any, clock: Callable[[], float], repeats: int) -> None:
        self.moe, self.tokens, self.cache, self.clock, self.repeats = moe, tokens, cache, clock, repeats

    def __call__(self, name: str, cells: list[Any], hook: Any, sweep: Callable[..., Any]) -> None:
        # whole layers at both ends and in the middle
        timed = [cell for cell in cells if cell[0] in (0, LAYERS // 2, LAYERS - 1)]
        times = {}
        for copies in COPIES:
            seconds = best(partial(loop, self.moe, self.tokens, timed, hook, copies), self.clock, self.repeats)
            times[copies] = seconds * len(cells) / len(timed)
        run = partial(sweep, self.moe, self.tokens, self.cache, metric, progress=False)
        ours, result = best(run, self.clock, self.repeats), run()
        reference = loop(self.moe, self.tokens, timed, hook, COPIES[-1])
        values = result.data["value"].sel(layer=sorted({layer for layer, _ in timed})).values
        difference = abs(values.reshape(reference.shape) - reference.numpy()).max()
        fastest = min(times, key=lambda copies: times[copies])
        print(f"{name}: {len(cells)} cells, {result.data.attrs['n_skipped']} without a pass")
        for copies, seconds in times.items():
            print(
                f"  run_with_hooks, {copies:2} copies a pass: {seconds:6.2f} s{' (best)' if copies == fastest else ''}"
            )
        print(f"  sweep: {ours:25.2f} s, {times[fastest] / ours:.1f} times as fast as the best")
        print(f"  largest difference of a value: {difference:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    moe = build(arguments.tokens)
    clean, corrupted = pairs(arguments.examples, arguments.tokens)
    kept = moe.filter("router_logits", "expert_indices", "expert_weights", "expert_out")
    _, cache = moe.bridge.run_with_cache(clean, names_filter=kept)
    _, routes = moe.bridge.run_with_cache(corrupted, names_filter=moe.filter("expert_indices"))
    forward = best(lambda: moe.bridge(corrupted), clock, 2 * arguments.repeats)
    print(
        f"{LAYERS} layers of {EXPERTS} experts, top {TOP_K}, width {D_MODEL}; {arguments.examples} examples of "
        f"{arguments.tokens} tokens; {arguments.threads} thread(s); a forward of the batch: {1e3 * forward:.0f} ms"
    )
    compare = Comparison(moe, corrupted, cache, clock, arguments.repeats)
    compare("expert_out, layer x expert", *expert_cells(moe, cache, routes), mi.patching.expert_out)
    compare("router_logits, layer x pos", *router_cells(moe, cache), mi.patching.router_logits)
    attribute = partial(mi.patching.attribution, moe, clean, corrupted, metric, audit=0, progress=False)
    # taking turns, as what else runs on the machine slows both
    turns = [(best(lambda: moe.bridge(corrupted), clock, 1), best(attribute, clock, 1)) for _ in range(9)]
    ratio = median(seconds / forward for forward, seconds in turns)
    n_cells = LAYERS * EXPERTS * arguments.tokens
    print(f"attribution, {n_cells} cells (layer x expert x pos): {ratio:.1f} forwards (median)")


if __name__ == "__main__":
    main()
