"""Does balancing scope decide whether specialization survives? The tables of docs/routing-study.md, from nothing.

    python benchmarks/routing_study.py --out out/routing_study --docs docs/routing-study.md [--seeds 3]

Finished runs are read back, an unfinished one is resumed; start it twice with --part 0/2 and --part 1/2 to use two
cores, then once without to write the page.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from scipy.stats import t as student

from moe_interp.testbed.compare import compare
from moe_interp.testbed.comparison import ComparisonResult
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.model import ModelConfig, build_model

ALL = ("none", "sequence", "micro_batch", "global", "global_running", "loss_free", "z_loss", "sigmoid")
ALL += ("expert_choice", "hash", "random", "global+capacity", "reference")
SCOPES = ("none", "sequence", "micro_batch", "global", "global+capacity")
SIZED = ("none", "sequence", "micro_batch", "global", "hash", "reference")

MODEL = ModelConfig(n_layers=2, d_model=64, n_heads=2, n_experts=16, top_k=2, d_expert=32, max_length=128)
BASE = TestbedConfig(
    model=MODEL,
    domains=("arithmetic", "facts", "puzzles", "lookups"),
    data_scale=0.15,
    length=128,
    micro_batch=8,
    micro_batches=4,
    steps=250,
    warmup_steps=25,
    lr=4e-3,
    balance=0.02,
    bias_rate=2e-3,
    capacity_factor=1.0,
    validate_every=125,
    checkpoint_every=250,
    log_every=50,
    validation_sequences=24,
)
SMALL = MODEL.model_copy(update={"d_model": 32, "d_expert": 8})
LARGE = MODEL.model_copy(update={"d_model": 128, "n_heads": 4, "d_expert": 64})

# table -> (what is changed, strategies)
GRIDS: dict[str, tuple[dict[str, object], Sequence[str]]] = {
    "mixed": ({}, ALL),
    "two_domains": ({"domains_per_micro_batch": 2}, SCOPES[1:4]),
    "pure": ({"domains_per_micro_batch": 1}, SCOPES),
    "small": ({"model": SMALL}, SIZED),
    "large": ({"model": LARGE}, SIZED),
}
COLUMNS = ("specialization", "mutual_information", "effective_experts", "max_violation", "dead_experts")
COLUMNS += ("dropped_slots", "loss_arithmetic", "loss_facts", "loss_puzzles", "loss_lookups")


def table(found: ComparisonResult) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    summary = found.table()
    lines = [
        "| strategy | " + " | ".join(c.replace("_", " ") for c in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for strategy, row in summary.iterrows():
        cells = [f"{row[c]:.3f} ± {row[f'{c}_sd']:.3f}" for c in COLUMNS]
        lines.append(f"| {strategy} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(found: ComparisonResult, metric: str, strategies: Sequence[str]) -> str:
    """Paired differences between strategies, and whether they exceed the seeds' spread (paired t, 95%)."""
    lines = [f"| {metric.replace('_', ' ')} | difference | standard error | verdict |", "|---|---|---|---|"]
    for first, second in combinations(strategies, 2):
        gap = found.difference(metric, first, second)
        if gap["seeds"] < 2:
            verdict = "one seed"
        else:
            clear = abs(gap["mean"]) > student.ppf(0.975, gap["seeds"] - 1) * gap["standard_error"]
            verdict = "beyond the seeds' spread" if clear else "within the seeds' spread"
            verdict += ", all of one sign" if gap["seeds_agree"] else ", signs differ"
        lines.append(f"| {first} - {second} | {gap['mean']:+.3f} | {gap['standard_error']:.3f} | {verdict} |")
    return "\n".join(lines)


def diversity(found: dict[str, ComparisonResult]) -> str:
    """Specialization by the domains of a micro-batch and the scope of balancing."""
    columns = {"pure": "one domain", "two_domains": "two domains", "mixed": "all domains"}
    lines = ["| scope | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    tables = {name: found[name].table() for name in columns}
    for strategy in SCOPES:
        rows = [table.loc[strategy] if strategy in table.index else None for table in tables.values()]
        cells = ["" if r is None else f"{r['specialization']:.3f} ± {r['specialization_sd']:.3f}" for r in rows]
        lines.append(f"| {strategy} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def size_agreement(small: ComparisonResult, large: ComparisonResult) -> str:
    """Rank agreement of the strategies between the two sizes."""
    lines = ["| metric | Spearman over strategies |", "|---|---|"]
    for metric in ("specialization", "mutual_information", "max_violation", "loss"):
        means = [c.runs.groupby("strategy")[metric].mean() for c in (small, large)]
        rho = spearmanr(means[0], means[1].reindex(means[0].index)).statistic
        lines.append(f"| {metric.replace('_', ' ')} | {rho:.2f} |")
    return "\n".join(lines)


def n_parameters(model: ModelConfig) -> int:
    return sum(p.numel() for p in build_model(model, BASE.vocab_size).parameters())


def page(found: dict[str, ComparisonResult], seeds: int) -> str:
    """The page: tables and how they were made; the words about them stand above, written by hand."""
    tokens = int(found["mixed"].runs["tokens"].iloc[0])
    parts = [
        f"Every run: {tokens:,} tokens, {seeds} seeds, four domains in equal shares; {MODEL.n_experts} experts top-"
        f"{MODEL.top_k}, {MODEL.n_layers} layers, {n_parameters(MODEL):,} parameters; a step of "
        f"{BASE.micro_batches} micro-batches of {BASE.micro_batch} x {BASE.length} tokens. Cells: mean ± standard "
        "deviation over seeds.",
        "## Every strategy, micro-batches of all domains\n\n" + table(found["mixed"]),
        "## Micro-batches of two domains\n\n" + table(found["two_domains"]),
        "## Micro-batches of one domain\n\n" + table(found["pure"]),
        "## Domains in a micro-batch x scope of balancing: specialization\n\n" + diversity(found),
        "## Differences, paired by seed",
    ]
    for name in ("mixed", "two_domains", "pure"):
        compared = [strategy for strategy in SCOPES[1:] if strategy in found[name].data.strategy]
        parts.append(
            f"Micro-batches: {name.replace('_', ' ')}.\n\n" + differences(found[name], "specialization", compared)
        )
    sizes = [f"{n_parameters(m):,}" for m in (SMALL, LARGE)]
    parts.append(
        f"## Two sizes: {sizes[0]} and {sizes[1]} parameters\n\n" + size_agreement(found["small"], found["large"])
    )
    parts += ["Small:\n\n" + table(found["small"]), "Large:\n\n" + table(found["large"])]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", default="0/1", help="i/n: train every n-th (table, seed) only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    index, n_parts = (int(number) for number in options.part.split("/"))
    jobs = [(name, seed) for seed in range(options.seeds) for name in GRIDS]
    for name, seed in jobs[index::n_parts]:
        changes, strategies = GRIDS[name]
        config = BASE.model_copy(update=changes)
        runs = compare(config, strategies, [seed], out=options.out / name, progress=False).runs
        print(f"{name}, seed {seed}\n{runs.round(3).to_string(index=False)}", flush=True)
    if options.docs is not None and n_parts == 1:
        found = {
            name: compare(BASE.model_copy(update=changes), strategies, range(options.seeds), out=options.out / name)
            for name, (changes, strategies) in GRIDS.items()
        }
        head = (
            options.docs.read_text(encoding="utf-8").split(MARK)[0] if options.docs.exists() else "# Routing study\n\n"
        )
        options.docs.write_text(head + MARK + "\n\n" + page(found, options.seeds), encoding="utf-8")


MARK = "<!-- tables below are written by benchmarks/routing_study.py -->"

if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
