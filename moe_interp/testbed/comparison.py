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
from moe_interp.testbed.gain_ratios import log_gains, ratios_over_seeds
from moe_interp.testbed.shared_direction import GAINS

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
# column of `runs` -> the gain that is divided by that of random directions
DIRECTIONS = {"shared_direction": "shared_gain", "domain_direction": "domain_gain"}
UNBALANCED = "none"
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
    seen on ``step``; where runs measured them, the gains of
    :func:`moe_interp.testbed.shared_direction.shared_direction_gains` on the axes of the metrics. The same seed gives
    the strategies the same data, order and initial weights.

    What it does not show: a strategy's best; every one runs with the same learning rate and coefficients.
    """

    main = "specialization"

    @property
    def runs(self) -> pd.DataFrame:
        """One row a run, at its last step: ``strategy, seed, tokens, dropped_slots``, the metrics averaged over layers,
        ``loss_<domain>`` and ``loss``, their mean over domains; where gains were measured, ``shared_direction`` and
        ``domain_direction``: ``shared_gain`` and ``domain_gain`` over ``random_gain``, averaged over layers."""
        last = self.data.isel(step=-1)
        flat = last[["tokens", "dropped_slots"]].merge(last[list(ROUTING)].mean("layer", skipna=False))
        for domain in last.domain.values:
            flat[f"loss_{domain}"] = last["domain_loss"].sel(domain=domain, drop=True)
        flat["loss"] = last["domain_loss"].mean("domain")
        for name in DIRECTIONS if "shared_gain" in last else ():
            flat[name] = (last[DIRECTIONS[name]] / last["random_gain"]).mean("layer", skipna=False)
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

    def gains(
        self,
        first: str,
        second: str | None = None,
        *,
        gain: str = "shared_gain",
        against: str | None = "random_gain",
        by_layer: bool = True,
    ) -> pd.DataFrame:
        """How strongly routers read a direction under ``first``; divided by the same under ``second``, seed by seed.

        With ``g = gain / against`` of a run, the number is ``exp(mean over seeds of log g)``, or of ``log g_first - log
        g_second``, with the interval of that mean (:func:`moe_interp.stats.mean_interval`). Weights of routers grow at
        different rates under different strategies: the gain along random directions, by which gains are divided, takes
        that out.

        Args:
            first, second: Strategies; without the second, ``first`` alone against a ratio of 1.
            gain: One of the gains of ``data``: ``shared_gain`` along the mean input, ``domain_gain`` along what differs
                between domains.
            against: Another, or None for the gain as it is.
            by_layer: A row a step and layer; otherwise a row a step, of the mean over layers of the logarithms.

        Returns:
            ``step`` (and ``layer``), ``ratio, low, high`` (95%), ``seeds``, ``verdict`` against 1 in words: "larger",
            "smaller", "no difference shown", or that there are too few seeds to say, which holds below 6. NaN where a
            gain is 0 or missing. Rows are not corrected for their number.

        Raises:
            ConfigError: No such gain, or strategies that are not here.
            DataError: The runs did not measure gains.

        What it does not show: a difference by chance in one of many rows; look at the step and layers chosen before.
        """
        logs = log_gains(self.data, gain, against)
        logs = logs if by_layer else logs.mean("layer", skipna=False)
        known = [str(name) for name in self.data["strategy"].values]
        if unknown := [name for name in (first, second) if name is not None and name not in known]:
            raise ConfigError(f"strategy {unknown[0]!r}", f"one of {', '.join(known)}", "Run it too.")
        chosen = logs.sel(strategy=first, drop=True)
        chosen = chosen if second is None else chosen - logs.sel(strategy=second, drop=True)
        return ratios_over_seeds(chosen, self._distinct_seeds())

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
        if "shared_gain" in self.data:
            parts.append(_lines(table, {name.replace("_direction", " dir."): name for name in DIRECTIONS}))
        for start in range(0, len(losses), LOSSES_A_TABLE):
            chosen = losses[start : start + LOSSES_A_TABLE]
            parts.append(_lines(table, {name[:11]: f"loss_{name}" for name in chosen}))
        parts.append(
            "specializ.: 0 for a router that ignores domains, 1 for the reference router\n"
            "use: exp(entropy of load) / experts; MaxVio: max / mean load - 1; dead: experts\n"
            "loss: nats per token of held-out text, mean over domains; below, each domain's"
        )
        if "shared_gain" in self.data:
            parts[-1] += (
                "\nshared dir., domain dir.: how strongly routers read the mean of their inputs,\n"
                "and what differs between domains' means; 1: as a random direction"
            )
            parts += self._said_of_gains()
        return "\n\n".join(parts)

    def _said_of_gains(self) -> list[str]:
        """Each strategy's reading of the shared direction against that without balancing, as far as seeds allow."""
        names = [str(name) for name in self.data["strategy"].values]
        if UNBALANCED not in names or len(names) < 2 or self.data.sizes["seed"] < 2:
            return []
        lines = []
        for name in names:
            if name != UNBALANCED:
                last = self.gains(name, UNBALANCED, by_layer=False).iloc[-1]
                interval = f"{last.ratio:.2f} [{last.low:.2f}, {last.high:.2f}]"
                lines.append(f"  {name}: {interval}, {last.verdict}")
        return ["\n".join([f"shared dir. against {UNBALANCED}, paired by seed, 95% interval:", *lines])]


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
    records = [record for row in grid for log in row for record in log]
    if any("shared_direction" in record for record in records):  # not by runs of earlier versions
        for name in GAINS:
            take = lambda r, name=name: r.get("shared_direction", {}).get(name, none)  # noqa: E731
            data[name] = ((*axes, "layer"), values(take))
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
