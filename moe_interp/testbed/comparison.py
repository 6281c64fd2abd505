"""What a grid of runs found: strategies and seeds side by side, by layer, by domain and over training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from moe_interp.errors import ConfigError
from moe_interp.results import Result
from moe_interp.testbed.config import TestbedConfig

ROUTING = (
    "specialization",
    "agreement",
    "mutual_information",
    "jsd",
    "effective_experts",
    "max_violation",
    "dead_experts",
    "dropped_tokens",
)

# column of the printed table -> column of `runs`
SHOWN = {"specializ.": "specialization", "use": "effective_experts", "MaxVio": "max_violation", "dead": "dead_experts"}
SHOWN |= {"loss": "loss"}
LOSSES_A_TABLE = 4  # so that it fits 80 columns

# (strategy, seed) -> a run's log
Histories = Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]


class RepeatedRunWarning(UserWarning):
    """Runs of several seeds that are the same in every number."""


class ComparisonResult(Result, kind="testbed"):
    """Runs of several strategies and seeds, measured on the same held-out sequences each time a run is validated.

    ``data``: the metrics of :func:`moe_interp.testbed.metrics.routing_metrics` on ``strategy, seed, step, layer``
    (those that compare domains are NaN where there is one); ``domain_loss`` (nats per token) on
    ``strategy, seed, step, domain``; ``dropped_slots`` of the training step on ``strategy, seed, step``; ``tokens``
    seen on ``step``. The same seed gives the strategies the same data, order and initial weights.

    What it does not show: a strategy's best; every one runs with the same learning rate and coefficients.
    """

    main = "specialization"

    @property
    def runs(self) -> pd.DataFrame:
        """One row a run, at its last step: ``strategy, seed, tokens, dropped_slots``, the metrics averaged over layers,
        ``loss_<domain>`` and ``loss``, their mean over domains."""
        last = self.data.isel(step=-1)
        flat = last[["tokens", "dropped_slots"]].merge(last[list(ROUTING)].mean("layer", skipna=False))
        for domain in last.domain.values:
            flat[f"loss_{domain}"] = last["domain_loss"].sel(domain=domain, drop=True)
        flat["loss"] = last["domain_loss"].mean("domain")
        frame = flat.drop_vars("step").to_dataframe(dim_order=["strategy", "seed"]).reset_index()
        return frame[["strategy", "seed", "tokens", *frame.columns.drop(["strategy", "seed", "tokens"])]]

    def table(self) -> pd.DataFrame:
        """Mean over seeds of each column of ``runs`` and, as ``<column>_sd``, its standard deviation (NaN for one)."""
        grouped = self.runs.drop(columns="seed").groupby("strategy", sort=False)
        return grouped.mean().join(grouped.std(ddof=1).add_suffix("_sd")).join(grouped.size().rename("seeds"))

    def difference(self, metric: str, first: str, second: str) -> dict[str, float]:
        """Mean over seeds of ``first - second``, its standard error, and whether every seed agrees on the sign.

        Seeds whose runs came out the same in every number are one. Agreement is no test: without any difference 2 seeds
        agree in half of the cases, 5 in one of 16.

        Raises:
            ConfigError: No such metric, or strategies that are not here.
        """
        runs = self.runs
        if metric not in runs.columns[2:]:
            known = ", ".join(map(str, runs.columns[2:]))
            raise ConfigError(f"metric {metric!r}", f"one of {known}", "Choose another.")
        wide = runs.pivot(index="seed", columns="strategy", values=metric)
        if not {first, second} <= set(wide):
            known = ", ".join(map(str, wide))
            raise ConfigError(f"strategies {first!r} and {second!r}", f"two of {known}", "Run them both.")
        gaps = (wide[first] - wide[second])[self._distinct_seeds()].to_numpy()
        error = float(np.std(gaps, ddof=1) / len(gaps) ** 0.5) if len(gaps) > 1 else float("nan")
        agree = bool((gaps > 0).all() or (gaps < 0).all())
        return {"mean": float(gaps.mean()), "standard_error": error, "seeds": len(gaps), "seeds_agree": agree}

    def _distinct_seeds(self) -> list[Any]:
        """The seeds whose runs differ from those of every seed before them, with a warning where not all do."""
        kept: dict[bytes, Any] = {}
        names = [*ROUTING, "domain_loss", "dropped_slots"]
        seeds = self.data["seed"].values.tolist()
        for seed in seeds:
            one = self.data[names].sel(seed=seed)
            kept.setdefault(b"".join(np.ascontiguousarray(one[name].values).tobytes() for name in names), seed)
        if len(kept) < len(seeds):
            same = ", ".join(str(seed) for seed in seeds if seed not in kept.values())
            warnings.warn(
                f"The runs of seed {same} came out as those of an earlier seed and are not counted again",
                RepeatedRunWarning,
                stacklevel=3,
            )
        return list(kept.values())

    def summary(self) -> str:
        """Strategy x specialization x use x loss with the seeds' spread, in 80 columns (names of up to 20 letters)."""
        table, sizes = self.table(), self.data.sizes
        tokens = int(self.data["tokens"][-1])
        spread = "mean±sd over seeds" if sizes["seed"] > 1 else "one seed, so no spread"
        head = f"{sizes['strategy']} strategies, seeds {', '.join(map(str, self.data.seed.values))}, {tokens:,} tokens"
        parts = [f"{head} a run: {spread}", _lines(table, SHOWN)]
        losses = [str(name) for name in self.data.domain.values]
        for start in range(0, len(losses), LOSSES_A_TABLE):
            chosen = losses[start : start + LOSSES_A_TABLE]
            parts.append(_lines(table, {name[:11]: f"loss_{name}" for name in chosen}))
        parts.append(
            "specializ.: 0 for a router that ignores domains, 1 for the reference router\n"
            "use: exp(entropy of load) / experts; MaxVio: max / mean load - 1; dead: experts\n"
            "loss: nats per token of held-out text, mean over domains; below, each domain's"
        )
        return "\n\n".join(parts)


def comparison(config: TestbedConfig, histories: Histories) -> ComparisonResult:
    """The result of runs of one configuration (but for strategy and seed), from their logs."""
    strategies = list(dict.fromkeys(strategy for strategy, _ in histories))
    seeds = list(dict.fromkeys(seed for _, seed in histories))
    kept = {key: [record for record in log if "validation" in record] for key, log in histories.items()}
    first = next(iter(kept.values()))
    coords = {
        "strategy": strategies,
        "seed": seeds,
        "step": [record["step"] for record in first],
        "layer": first[-1]["routing"]["layer"],
        "domain": list(first[-1]["validation"]),
    }
    grid = [[kept[strategy, seed] for seed in seeds] for strategy in strategies]

    def values(take: Any) -> np.ndarray:
        return np.array([[[take(record) for record in log] for log in row] for row in grid], dtype=float)

    axes = ("strategy", "seed", "step")
    none = [np.nan] * len(coords["layer"])
    data: dict[str, Any] = {
        name: ((*axes, "layer"), values(lambda r, name=name: r["routing"].get(name, none))) for name in ROUTING
    }
    data["domain_loss"] = ((*axes, "domain"), values(lambda r: list(r["validation"].values())))
    data["dropped_slots"] = (axes, values(lambda r: r["dropped_slots"]))
    data["tokens"] = ("step", [record["tokens"] for record in first])
    options = config.model_dump(mode="json", exclude={"strategy", "seed"})
    return ComparisonResult(xr.Dataset(data, coords), config=options, seeds={f"seed {seed}": seed for seed in seeds})


def _lines(table: pd.DataFrame, columns: Mapping[str, str]) -> str:
    """A text table of ``mean±sd`` cells."""
    cells = pd.DataFrame(
        {name: [_cell(row, column) for _, row in table.iterrows()] for name, column in columns.items()}
    )
    return cells.set_axis(table.index.rename(None), axis=0).to_string()


def _cell(row: pd.Series, column: str) -> str:
    if column == "dead_experts":
        return f"{row[column]:.1f}"
    spread = row[f"{column}_sd"]
    return f"{row[column]:.3f}" + ("" if np.isnan(spread) else f"±{spread:.3f}")
