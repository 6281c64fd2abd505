"""Several strategies and seeds side by side: specialization, use and loss, with the spread over seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_interp.errors import ConfigError
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.domains import Domain
from moe_interp.testbed.registry import load_domains
from moe_interp.testbed.strategies import check_strategy
from moe_interp.testbed.train import train

_ROUTING = ("specialization", "mutual_information", "jsd", "effective_experts", "max_violation", "dead_experts")


@dataclass(frozen=True)
class Comparison:
    """One row a run: ``strategy, seed, tokens``, the routing metrics averaged over layers, ``loss_<domain>``.

    Routing and losses are those of the held-out sequences at the end of training, ``dropped_slots`` of its last step.
    The same seed gives the strategies the same data, order and initial weights.
    """

    runs: pd.DataFrame

    def summary(self) -> pd.DataFrame:
        """Mean over seeds of each column and, as ``<column>_sd``, its standard deviation (NaN for one seed)."""
        numbers = self.runs.drop(columns="seed")
        grouped = numbers.groupby("strategy", sort=False)
        return grouped.mean().join(grouped.std(ddof=1).add_suffix("_sd")).join(grouped.size().rename("seeds"))

    def difference(self, metric: str, first: str, second: str) -> dict[str, float]:
        """Mean over seeds of ``first - second``, its standard error, and whether every seed agrees on the sign.

        Raises:
            ConfigError: No such metric, or strategies without a common seed.
        """
        if metric not in self.runs:
            raise ConfigError(f"metric {metric!r}", f"one of {list(self.runs.columns[2:])}", "Choose another.")
        wide = self.runs.pivot(index="seed", columns="strategy", values=metric)
        pairs = wide[[s for s in (first, second) if s in wide]].dropna()
        if pairs.shape[1] < 2 or pairs.empty:
            raise ConfigError(f"strategies {first!r} and {second!r}", "two with a seed in common", "Run them both.")
        gaps = (pairs[first] - pairs[second]).to_numpy()
        error = float(np.std(gaps, ddof=1) / len(gaps) ** 0.5) if len(gaps) > 1 else float("nan")
        agree = bool((gaps > 0).all() or (gaps < 0).all())
        return {"mean": float(gaps.mean()), "standard_error": error, "seeds": len(gaps), "seeds_agree": agree}


def compare(
    config: TestbedConfig,
    strategies: Sequence[str],
    seeds: Sequence[int] = (0, 1, 2),
    *,
    out: Path | str | None = None,
    domains: Sequence[Domain] | None = None,
    progress: bool = True,
) -> Comparison:
    """Train every strategy with every seed. With ``out``, finished runs are read back and an unfinished one resumed.

    Args:
        config: Everything but strategy and seed.
        domains: The data of every run; by default the configuration's, generated anew for each seed.

    Raises:
        ConfigError: An unknown strategy, or none.
        ResultError: ``out`` holds runs of another configuration.
    """
    for strategy in strategies:
        check_strategy(strategy)
    if not strategies or not seeds:
        raise ConfigError(f"strategies {list(strategies)}, seeds {list(seeds)}", "at least one of each", "Name some.")
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        base = config.model_copy(update={"seed": seed})
        data = domains
        for strategy, cell, folder in _cells(base, strategies, None if out is None else Path(out)):
            last = _finished(cell, folder)
            if last is None:
                data = load_domains(base) if data is None else data
                run = train(cell, domains=data, out=folder, resume=folder is not None, progress=progress)
                last = run.history[-1]
            rows.append({"strategy": strategy, "seed": seed, **row_of(last)})
    order = {(strategy, seed): i for i, (strategy, seed) in enumerate(product(strategies, seeds))}
    rows.sort(key=lambda row: order[row["strategy"], row["seed"]])
    return Comparison(pd.DataFrame(rows))


def row_of(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a run's last record: routing metrics averaged over layers, dropped slots, losses by domain."""
    row: dict[str, float] = {"tokens": record["tokens"], "dropped_slots": record["dropped_slots"]}
    row |= {name: float(np.mean(record["routing"][name])) for name in _ROUTING if name in record["routing"]}
    row |= {f"loss_{name}": loss for name, loss in record["validation"].items()}
    return row | {"loss": float(np.mean(list(record["validation"].values())))}


def _cells(
    base: TestbedConfig, strategies: Sequence[str], out: Path | None
) -> Iterator[tuple[str, TestbedConfig, Path | None]]:
    for strategy in strategies:
        folder = None if out is None else out / f"{strategy}-seed{base.seed}"
        yield strategy, base.model_copy(update={"strategy": strategy}), folder


def _finished(config: TestbedConfig, folder: Path | None) -> dict[str, Any] | None:
    """The last record of a finished run of this very configuration, or None."""
    if folder is None or not (folder / "model").is_dir():
        return None
    if TestbedConfig.model_validate_json((folder / "config.json").read_text(encoding="utf-8")) != config:
        return None  # train() refuses it, and says so
    last: dict[str, Any] = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return last
