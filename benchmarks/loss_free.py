"""Does the loss-free bias balance every layer within the demo model's training length?

    python benchmarks/loss_free.py --out out/loss_free.csv [--steps 1000] [--schedule 3000] [--strategy loss_free]

The demo preset's model and data under another strategy: the first ``steps`` of a schedule of 3000, the demo's, in which
the learning rate has not decayed yet and routers still move; or a whole schedule that is shorter. MaxVio of a layer is
that of its load over a window of training steps, and of its load on held-out text weighted by the training mix's
shares. One thread.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator

from moe_interp.testbed.demo import expert_use
from moe_interp.testbed.domains.registry import load_domains
from moe_interp.testbed.evaluate import max_violation
from moe_interp.testbed.presets import DEMO
from moe_interp.testbed.training.trainer import Trainer

WINDOW = 50  # steps


def measure(strategy: str, steps: int, schedule: int, every: int) -> pd.DataFrame:
    """One row a measurement and layer."""
    config = DEMO.model_copy(update={"strategy": strategy, "steps": schedule, "validation_sequences": 96})
    trainer = Trainer(config, load_domains(config), Accelerator(cpu=True))
    shares = dict(zip(config.domains, config.shares or ()))
    window: list[torch.Tensor] = []
    rows = []
    while trainer.step < steps:
        made = trainer.train_step()
        window = [*window[1 - WINDOW :], torch.stack(list(made["loads"].values()))]
        if trainer.step % every and trainer.step != steps:
            continue
        found = trainer.evaluate()
        use = expert_use(found.trace, shares)
        load = torch.stack(window).mean(0)
        for number, layer in enumerate(made["loads"]):
            row = {"strategy": strategy, "step": trainer.step, "layer": layer}
            row |= {"max_violation_step": max_violation(made["loads"][layer])}
            row |= {"max_violation_window": max_violation(load[number])}
            row |= {"max_violation_held_out": use["max_violation"][number]}
            row |= {"smallest_load_window": float(load[number].min() * load.shape[1])}
            row |= {"smallest_load_held_out": use["smallest_load"][number]}
            row |= {"dead_experts_window": int((load[number] == 0).sum())}
            rows.append(row | {f"loss_{name}": loss for name, loss in found.losses.items()})
        print(pd.DataFrame(rows[-len(load) :]).round(3).to_string(index=False), flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--schedule", type=int, default=DEMO.steps)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--strategy", default="loss_free")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    measure(options.strategy, options.steps, options.schedule, options.every).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
