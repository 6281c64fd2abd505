"""Results of patching: effects by cell and example, and what derives from them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray
from transformer_lens.patching import PatchingResult
from transformer_lens.utilities.statistics import derive_generator, sign_flip_permutation_pvalue

from moe_interp.checks import check_seed, check_whole
from moe_interp.errors import ConfigError, DataError
from moe_interp.patching.inputs import layer_name
from moe_interp.patching.metric import ONLY, Metrics
from moe_interp.results import Result
from moe_interp.stats import mean_interval

EXAMPLE, METRIC = "example", "metric"
_PATTERNS_AT_ONCE = 2**24  # sign patterns times cells times examples


class EffectResult(Result):
    """Effects on a metric by cell, such as layer by position, kept for each example where the metric gives them.

    ``data`` holds effect[metric?, cell axes, example?]. The axis ``metric`` is there where several metrics were given
    by name, ``example`` where a metric gave one number an example. NaN: there is no such cell (for this example).
    """

    main = "effect"

    @property
    def cell_axes(self) -> tuple[str, ...]:
        """The axes of a cell, such as ``("layer", "pos")``."""
        return tuple(str(axis) for axis in self.data["effect"].dims if axis not in (METRIC, EXAMPLE))

    @property
    def is_per_example(self) -> bool:
        """Whether there is one effect an example."""
        return EXAMPLE in self.data["effect"].dims

    def mean(self, metric: str | None = None, variable: str = "effect") -> xr.DataArray:
        """The mean over examples by cell, in the metric's unit; over those that have the cell.

        Args:
            metric: Of several metrics, which; the first by default.
            variable: Of ``data``.
        """
        values = self.of_metric(metric)[variable]
        return values.mean(EXAMPLE) if EXAMPLE in values.dims else values

    def table(self, metric: str | None = None, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """One row a cell: ``n`` examples, mean effect, its interval, and p.

        The interval is that of :func:`moe_interp.stats.mean_interval` over examples, which covers what it says from
        few examples on: a percentile bootstrap (TransformerLens' ``bootstrap_ci``, to be had with
        :meth:`to_patching_result`) covers .51, .75, .88 and .91 of .95 with 2 to 5 examples. p is of TransformerLens'
        ``sign_flip_permutation_pvalue``: two-sided, exact up to 12 examples. Both are NaN with fewer than 2 examples,
        and without one effect an example. p is not corrected for the number of cells.

        Args:
            metric: Of several metrics, which; the first by default.
            level: Of the interval.
            seed: Of the permutations.
        """
        index, flat = self._cells(metric)
        return self._table(index, flat, level, seed)

    def top(self, k: int = 10, metric: str | None = None, by: str = "abs") -> pd.DataFrame:
        """The ``k`` cells of the largest mean effect, as rows of :meth:`table`.

        The intervals of cells that were chosen for being large do not allow for the choice.

        Args:
            k: How many.
            metric: Of several metrics, which; the first by default.
            by: "abs" by size, "positive" or "negative" by sign.
        """
        k = check_whole(k, "k", 1)
        if by not in ("abs", "positive", "negative"):
            raise ConfigError(f"by={by!r}", "abs, positive or negative", "Choose one of these.")
        index, flat = self._cells(metric)
        there = ~np.isnan(flat)
        mean = np.where(there, flat, 0.0).sum(axis=1) / np.maximum(there.sum(axis=1), 1)
        key = {"abs": np.abs(mean), "positive": mean, "negative": -mean}[by]
        chosen = np.argsort(-np.where(there.any(axis=1), key, -np.inf), kind="stable")[
            : min(k, there.any(axis=1).sum())
        ]
        return self._table(index.iloc[chosen].reset_index(drop=True), flat[chosen])

    def _cells(self, metric: str | None) -> tuple[pd.DataFrame, NDArray[np.float64]]:
        """The labels of all cells, and their effects ``[cell, example]``."""
        chosen, axes = self.of_metric(metric)["effect"], self.cell_axes
        cells = (
            chosen.transpose(*axes, EXAMPLE) if self.is_per_example else chosen.transpose(*axes).expand_dims("_", -1)
        )
        labels = itertools.product(*[cells[axis].values.tolist() for axis in axes])
        return pd.DataFrame(list(labels), columns=list(axes)), cells.values.reshape(-1, cells.shape[-1]).astype(float)

    def _table(
        self, index: pd.DataFrame, flat: NDArray[np.float64], level: float = 0.95, seed: int = 0
    ) -> pd.DataFrame:
        statistics = _statistics(flat, level, check_seed(seed), self.is_per_example)
        return pd.concat([index, pd.DataFrame(statistics)], axis=1)

    def to_patching_result(self) -> PatchingResult:
        """The same numbers as TransformerLens' ``PatchingResult``, with its methods.

        It is no subclass of it: that holds its values in a tensor without labels, and can be neither saved nor joined
        with the counts that belong to a cell. ``values`` are effects plus baseline, ``[metric?, cell axes, example?]``.
        """
        effect, per_example = self.data["effect"], self.is_per_example
        has_metrics = METRIC in effect.dims
        order = [*([METRIC] if has_metrics else []), *self.cell_axes, *([EXAMPLE] if per_example else [])]
        baseline = self.data.get("baseline")
        values = effect if baseline is None else effect + baseline
        axes = [effect[axis].values.tolist() for axis in self.cell_axes]
        return PatchingResult(
            values=torch.as_tensor(values.transpose(*order).values.copy()),
            axis_names=list(self.cell_axes),
            index_df=pd.DataFrame(list(itertools.product(*axes)), columns=list(self.cell_axes)),
            metric_names=[str(name) for name in effect[METRIC].values] if has_metrics else [ONLY],
            reduced=not per_example,
            baseline=None if baseline is None else torch.as_tensor(baseline.values.copy()),
            has_metric_axis=has_metrics,
        )

    def of_metric(self, metric: str | None = None) -> xr.Dataset:
        """``data`` of one of several metrics; the first by default."""
        if METRIC not in self.data.dims:
            if metric not in (None, ONLY):
                raise ConfigError(f"metric={metric!r}", "no name: one metric was given, without one", "Leave it out.")
            return self.data
        names = self.data[METRIC].values.tolist()
        if metric is not None and metric not in names:
            raise ConfigError(f"metric={metric!r}", f"one of {', '.join(names)}", "Choose one of these.")
        return self.data.sel({METRIC: names[0] if metric is None else metric})


class PatchingSweep(EffectResult, kind="patching"):
    """A metric of the corrupted run with one activation after the other taken from the clean run.

    ``data``: value[metric?, cell axes, example?], the patched metric; effect = value - baseline, positive where the
    patch raises the metric; baseline[metric?, example?] of the corrupted run, clean[metric?, example?] where the clean
    run's logits were given; n_patched[cell axes, example], how many activations were replaced, and n_unmatched[cell
    axes, example], how many the clean run has no counterpart for.
    """

    def normalized(self, metric: str | None = None) -> xr.DataArray:
        """Mean effect over mean gap, (patched - corrupted) / (clean - corrupted), by cell: 0 nothing, 1 all restored.

        Means are over the examples that have the cell, and are taken before dividing: an example whose clean and
        corrupted metrics are almost equal would otherwise decide. ``to_patching_result().normalized(...)`` divides
        example by example.

        Raises:
            ConfigError: the clean run's metric is not known.
            DataError: the two runs' metrics are equal.
        """
        data = self.of_metric(metric)
        if "clean" not in data:
            raise ConfigError(
                "a sweep without the clean run's metric", "one that knows it", "Pass clean_logits to the sweep."
            )
        gap = data["clean"] - data["baseline"]
        gap = gap.where(data["effect"].notnull())
        gap = gap.mean(EXAMPLE) if EXAMPLE in gap.dims else gap
        if bool((gap == 0).any()):
            raise DataError(
                "a metric that is the same for the clean and the corrupted run",
                "runs that differ",
                "Choose other prompts, or read the effects as they are.",
            )
        return self.mean(metric) / gap

    def summary(self) -> str:
        """What was patched, on how many cells, the largest effects, and how the passes were made."""
        attrs, data = self.data.attrs, self.of_metric()
        effect = data["effect"]
        mean = self.mean()
        sizes = " x ".join(f"{mean.sizes[axis]} {axis}" for axis in self.cell_axes)
        lines = [f"Patching {attrs['what']}: {sizes}, {attrs['n_examples']} examples; metric {attrs['metrics'][0]}"]
        base = f"corrupted {float(data['baseline'].mean()):.4g}"
        if "clean" in data:
            base += f", clean {float(data['clean'].mean()):.4g}"
        lines.append(base)
        rows = self.top(3)
        lines += [
            f"  {_cell(row, self.cell_axes)}: effect {row['mean']:+.4g}{_interval(row)}"
            for row in rows.to_dict("records")
        ]
        absent = int((effect.isnull()).all(EXAMPLE).sum()) if EXAMPLE in effect.dims else int(effect.isnull().sum())
        n_zero = attrs.get("n_skipped", 0)
        n_cells = int(mean.size) - absent
        lines.append(f"{n_cells} cells, {n_zero} of them without a pass, as they change nothing; by {attrs['method']}")
        if attrs.get("null_difference") is not None:
            lines.append(f"a pass with nothing patched differs by {attrs['null_difference']:.1e} from the plain one")
        return "\n".join(lines)


def effect_dataset(
    metrics: Metrics,
    axes: Mapping[str, Sequence[Any]],
    effect: NDArray[Any],
    n_examples: int,
    **more: tuple[tuple[str, ...], NDArray[Any]],
) -> xr.Dataset:
    """A dataset in the form of :class:`EffectResult`.

    Args:
        metrics: Evaluated before.
        axes: Labels of the cell axes, in order; layers as labels.
        effect: ``[metric, *cells, example]``, or ``[metric, *cells, 1]`` of plain numbers.
        n_examples: In the batch.
        more: Further variables, their axes and values; ``(METRIC, ..., EXAMPLE)`` are left out where they are not kept,
            and then have length 1.
    """
    coords: dict[str, Any] = {name: _labels(name, values) for name, values in axes.items()}
    coords[EXAMPLE] = np.arange(n_examples)
    if metrics.has_names:
        coords[METRIC] = list(metrics.names)
    variables = {"effect": ((METRIC, *axes, EXAMPLE), effect), **more}
    kept = {}
    for name, (dims, values) in variables.items():
        drops = {METRIC: not metrics.has_names, EXAMPLE: not metrics.is_per_example and name in _OF_METRIC}
        index = tuple(0 if drops.get(dim, False) else slice(None) for dim in dims)
        kept[name] = (tuple(dim for dim in dims if not drops.get(dim, False)), np.asarray(values)[index])
    used = {dim for dims, _ in kept.values() for dim in dims}
    return xr.Dataset(kept, coords={name: value for name, value in coords.items() if name in used})


_OF_METRIC = ("effect", "value", "baseline", "clean")


def _labels(name: str, values: Sequence[Any]) -> list[Any]:
    return [layer_name(value) for value in values] if name == "layer" else list(values)


def _statistics(flat: NDArray[np.float64], level: float, seed: int, per_example: bool) -> dict[str, NDArray[Any]]:
    """n, mean, interval and p of each row ``[cell, example]``; rows with the same examples are taken together."""
    there = ~np.isnan(flat)
    n = there.sum(axis=1)
    found = {name: np.full(len(flat), np.nan) for name in ("mean", "ci_low", "ci_high", "p")}
    for pattern in np.unique(there, axis=0):
        rows = np.flatnonzero((there == pattern).all(axis=1))
        if not pattern.any():
            continue
        values = flat[np.ix_(rows, np.flatnonzero(pattern))]
        found["mean"][rows] = values.mean(axis=1)
        if per_example and values.shape[1] > 1:
            interval = mean_interval(values, level=level)
            found["ci_low"][rows], found["ci_high"][rows] = interval.low, interval.high
            found["p"][rows] = _p_values(values, seed)
    return {"n": n if per_example else np.where(n > 0, 1, 0), **found}


def _p_values(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    patterns = 2 ** values.shape[1] if values.shape[1] <= 12 else 1000
    step = max(1, _PATTERNS_AT_ONCE // (patterns * values.shape[1]))
    parts = [
        sign_flip_permutation_pvalue(torch.as_tensor(part), generator=derive_generator(seed, "permutation")).numpy()
        for part in (values[start : start + step] for start in range(0, len(values), step))
    ]
    return np.concatenate(parts)


def _cell(row: Any, axes: Sequence[str]) -> str:
    return ", ".join(f"{axis} {row[axis]}" for axis in axes)


def _interval(row: Any) -> str:
    return "" if np.isnan(row["ci_low"]) else f" [{row['ci_low']:+.4g}, {row['ci_high']:+.4g}]"
