"""What a training step of the testbed costs: ratios to a plain loop over the same transformers model.

    python benchmarks/testbed.py [--rounds 12]

The demo model's sizes, 12 x 256 tokens a micro-batch, AdamW. The plain loop runs the model with transformers' own
attention and nothing else: forward, cross-entropy, backward, clipping, optimiser step. Every round times every way
once, in random order; the table gives the median over rounds of the ratio to the same round's plain step. Times are
processor time on one thread, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator

from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.domains.domain import Domain
from moe_interp.testbed.domains.facts import facts
from moe_interp.testbed.domains.puzzles import puzzles
from moe_interp.testbed.evaluate import token_losses
from moe_interp.testbed.model import build_model
from moe_interp.testbed.presets import DEMO
from moe_interp.testbed.training.optimizers import make_optimizers
from moe_interp.testbed.training.trainer import Trainer

STRATEGIES = ("none", "micro_batch", "sequence", "global_running", "loss_free", "reference", "micro_batch+capacity")
LIMITS = {"global": 1.7}  # its load is measured in a pass of its own
LIMIT = 1.3
SIZES = {"n_train": 2000, "n_validation": 20, "n_items": 15}


def plain_step(config: TestbedConfig, trainer: Trainer) -> Callable[[], None]:
    """The same step without the testbed."""
    model = build_model(config.model, len(trainer.tokenizer), config.seed).train()
    optimizer = make_optimizers(model, "adamw", config.lr, config.muon_lr, config.weight_decay)[0]

    def step() -> None:
        for micro in range(config.micro_batches):
            tokens, _ = trainer.micro_batch(micro)
            loss = token_losses(model(tokens, use_cache=False).logits, tokens).mean() / config.micro_batches
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def testbed_step(config: TestbedConfig, domains: list[Domain]) -> Callable[[], None]:
    """A step of the testbed, always on the first micro-batches."""
    trainer = Trainer(config, domains, Accelerator(cpu=True))

    def step() -> None:
        trainer.step = 0
        trainer.train_step()

    return step


def measure(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of every way in every round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in random.sample(list(ways), len(ways)):
            start = time.process_time()
            ways[name]()
            if number:
                times[name].append(time.process_time() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    domains = [facts(**SIZES), puzzles(**SIZES)]
    base = DEMO.model_copy(
        update={"domains": ("facts", "puzzles"), "shares": None, "optimizer": "adamw", "micro_batch": 12, "steps": 4}
    )
    for micro_batches, strategies in ((1, STRATEGIES), (2, ("micro_batch", "global"))):
        config = base.model_copy(update={"micro_batches": micro_batches})
        ways = {s: testbed_step(config.model_copy(update={"strategy": s}), domains) for s in strategies}
        ways["plain loop"] = plain_step(config, Trainer(config, domains, Accelerator(cpu=True)))
        times = measure(ways, rounds)
        plain = times.pop("plain loop")
        print(f"\n{micro_batches} micro-batches a step: plain loop {statistics.median(plain):.3f} s")
        for name, values in times.items():
            ratio, limit = statistics.median(v / p for v, p in zip(values, plain)), LIMITS.get(name, LIMIT)
            print(f"  {name:22s} {ratio:.2f}x   (limit {limit}{'' if ratio <= limit else ', EXCEEDED'})")


if __name__ == "__main__":
    main()
