"""Does balancing the load suppress the direction that all inputs of a router share?

The tables of docs/shared-direction.md, from nothing:

    python benchmarks/shared_direction.py --out out/shared_direction --docs docs/shared-direction.md [--seeds 6]

The same models, data and initial weights with and without a balancing loss, on batches of all domains, of two and of
one. About ten minutes on one core. Finished runs are read back and an unfinished one is resumed, seed by seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from moe_interp.plots import save_figure
from moe_interp.testbed.compare import compare
from moe_interp.testbed.comparison import ComparisonResult
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.gain_ratios import log_gains, ratios_over_seeds
from moe_interp.testbed.model import ModelConfig

MODEL = ModelConfig(n_layers=2, d_model=64, n_heads=2, n_experts=16, top_k=2, d_expert=32, max_length=128)
BASE = TestbedConfig(
    model=MODEL,
    domains=("arithmetic", "facts", "puzzles", "lookups"),
    data_scale=0.04,
    length=128,
    micro_batch=8,
    steps=160,
    warmup_steps=16,
    lr=4e-3,
    balance=0.02,
    validate_every=20,
    checkpoint_every=160,
    log_every=50,
    validation_sequences=12,
)
# batches -> (domain draws a step, strategies)
BATCHES: dict[str, tuple[int | None, Sequence[str]]] = {
    "all domains": (None, ("none", "micro_batch", "sequence")),
    "two domains": (2, ("none", "micro_batch")),
    "one domain": (1, ("none", "micro_batch")),
}
GAINS = {
    "shared_gain": "mean input",
    "domain_gain": "domains' means",
    "principal_gain": "principal axes",
    "centred_gain": "centred inputs",
}
MARK = "<!-- tables below are written by benchmarks/shared_direction.py -->"


def runs_of(batches: str, seeds: Sequence[int], out: Path, progress: bool = False) -> ComparisonResult:
    """The runs on one kind of batches, trained or read back."""
    draws, strategies = BATCHES[batches]
    config = BASE.model_copy(update={"domains_per_step": draws})
    return compare(config, strategies, seeds, out=out / batches.replace(" ", "_"), progress=progress)


def cell(row: pd.Series) -> str:
    """A ratio with its interval."""
    return f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(row) for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def last_of(found: ComparisonResult, first: str, second: str | None, gain: str, **options: object) -> pd.Series:
    """Of the last step, the mean over layers."""
    return found.gains(first, second, gain=gain, by_layer=False, **options).iloc[-1]  # type: ignore[arg-type]


def at_the_end(found: dict[str, ComparisonResult]) -> str:
    """Each kind of run's gains against random directions, and what balancing and training came to."""
    header = ["batches", "strategy", *GAINS.values(), "offset", "MaxVio", "loss"]
    rows = []
    for batches, result in found.items():
        table = result.table()
        for strategy in BATCHES[batches][1]:
            cells = [cell(last_of(result, strategy, None, gain)) for gain in GAINS]
            cells.append(cell(last_of(result, strategy, None, "shared_offset", against=None)))
            cells += [f"{table[name].to_dict()[strategy]:.2f}" for name in ("max_violation", "loss")]
            rows.append([batches, strategy, *cells])
    return markdown(header, rows)


def with_against_without(found: dict[str, ComparisonResult]) -> str:
    """Gains with the balancing loss over those without, paired by seed, for each layer and their mean."""
    header = ["batches", "balance", "layer", "mean input", "in words", "domains' means", "in words"]
    rows = []
    for batches, result in found.items():
        for strategy in BATCHES[batches][1][1:]:
            tables = {gain: result.gains(strategy, "none", gain=gain) for gain in ("shared_gain", "domain_gain")}
            last = result.data["step"].values[-1]
            for layer in result.data["layer"].values:
                cells = [t[(t["step"] == last) & (t["layer"] == layer)].iloc[0] for t in tables.values()]
                rows.append([batches, strategy, str(layer), *(v for c in cells for v in (cell(c), c["verdict"]))])
            means = [last_of(result, strategy, "none", gain) for gain in tables]
            rows.append([batches, strategy, "mean", *(v for c in means for v in (cell(c), c["verdict"]))])
    return markdown(header, rows)


def over_training(found: dict[str, ComparisonResult], gain: str) -> str:
    """With the balancing loss over without, at each validation, the mean over layers."""
    columns = {
        f"{batches}, {strategy}": result.gains(strategy, "none", gain=gain, by_layer=False)
        for batches, result in found.items()
        for strategy in BATCHES[batches][1][1:]
    }
    steps = next(iter(columns.values()))["step"]
    rows = [[str(step), *(cell(table.iloc[i]) for table in columns.values())] for i, step in enumerate(steps.to_list())]
    return markdown(["step", *columns], rows)


def diversity(found: dict[str, ComparisonResult]) -> str:
    """The effect of balancing on one kind of batches over that on batches of all domains, paired by seed."""
    rows = []
    for gain in ("shared_gain", "domain_gain"):
        effects = {}
        for batches, result in found.items():
            logs = log_gains(result.data, gain, "random_gain").mean("layer").isel(step=[-1])
            free = logs.sel(strategy="none", drop=True)
            for strategy in BATCHES[batches][1][1:]:
                effects[batches, strategy] = logs.sel(strategy=strategy, drop=True) - free
        whole = effects["all domains", "micro_batch"]
        for (batches, strategy), effect in effects.items():
            if effect is not whole:
                row = ratios_over_seeds(effect - whole, whole["seed"].values.tolist()).iloc[0]
                rows.append([GAINS[gain], f"{batches}, {strategy}", cell(row), row["verdict"]])
    return markdown(["direction", "against micro_batch on all domains", "ratio of the effects", "in words"], rows)


def page(found: dict[str, ComparisonResult], seeds: int) -> str:
    """The tables; the words about them stand above, written by hand."""
    tokens = int(next(iter(found.values())).data["tokens"][-1])
    parts = [
        f"Every run: {tokens:,} tokens in {BASE.steps} steps of {BASE.micro_batch} x {BASE.length}, {seeds} seeds; "
        f"{MODEL.n_layers} layers, {MODEL.n_experts} experts top-{MODEL.top_k}, d_model {MODEL.d_model}; balancing "
        f"coefficient {BASE.balance}. Geometric means over seeds with 95% intervals.",
        "## At the end of training\n\nGains divided by that along random directions; offset: ||Pi_e W mu|| / rms "
        "||Pi_e W (h - mu)||. Means over layers.\n\n" + at_the_end(found),
        "## With against without the balancing loss\n\nGains (divided by that along random directions) with the loss "
        "over those without, paired by seed, at the end.\n\n" + with_against_without(found),
        "## Over training\n\nThe same for the mean input, mean over layers.\n\n" + over_training(found, "shared_gain"),
        "For what differs between domains' means:\n\n" + over_training(found, "domain_gain"),
        "## Does the suppression follow the batch?\n\nThe effect of balancing (with over without) on other batches "
        "over that on batches of all domains, paired by seed: below 1, a stronger suppression.\n\n" + diversity(found),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--seeds", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(options.seeds):
        for batches in BATCHES:
            runs = runs_of(batches, [seed], options.out).runs
            shown = ["strategy", "seed", "shared_direction", "domain_direction", "max_violation", "loss"]
            print(f"{batches}\n{runs[shown].round(3).to_string(index=False)}", flush=True)
    found = {batches: runs_of(batches, range(options.seeds), options.out) for batches in BATCHES}
    for batches, result in found.items():
        for gain in ("shared_gain", "domain_gain"):
            name = f"{batches} {gain}".replace(" ", "_")
            save_figure(result.plot("shared_direction", gain=gain), options.out / f"{name}.svg")
    text = page(found, options.seeds)
    print(text)
    if options.docs is not None:
        head = options.docs.read_text(encoding="utf-8").split(MARK)[0] if options.docs.exists() else ""
        options.docs.write_text(head + MARK + "\n\n" + text, encoding="utf-8")


if __name__ == "__main__":
    main()
