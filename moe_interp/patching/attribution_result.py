"""The result of attribution patching, and its agreement with exact patching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moe_interp.checks import check_seed, check_whole
from moe_interp.errors import ConfigError
from moe_interp.patching.result import METRIC, EffectResult
from moe_interp.stats import derive_rng, spearman

Cells = list[tuple[int, ...]]
"""Places on the axes of a result."""

N_RECALLED = 10


@dataclass(frozen=True)
class Agreement:
    """How well estimates agree with exact patching, on a sample of cells: the largest estimates, and random others.

    Attributes:
        spearman: Over all sampled cells, NaN where a side is constant. Half of them were chosen for large estimates, so
            it is higher than over all cells.
        spearman_random: Over the random cells alone.
        recall: Of the 10 cells (or all, where fewer) with the largest exact effect in the sample, the share that is
            among the 10 with the largest estimate.
        largest_random: The largest exact effect of a random cell, as a share of the largest of all sampled ones: near 1
            where the estimates miss what matters.
        n_top, n_random: Sampled cells; random ones are drawn among the cells that either run uses.
        seed: Of the random ones.
    """

    spearman: float
    spearman_random: float
    recall: float
    largest_random: float
    n_top: int
    n_random: int
    seed: int

    def summary(self) -> str:
        """One sentence."""
        return (
            f"Against exact patching of {self.n_top + self.n_random} cells ({self.n_top} of the largest estimates, "
            f"{self.n_random} at random): Spearman {self.spearman:.2f} (random cells {self.spearman_random:.2f}), "
            f"top-{N_RECALLED} recall {self.recall:.2f}; the largest effect of a random cell is "
            f"{self.largest_random:.2f} of the largest found."
        )


class AttributionResult(EffectResult, kind="attribution"):
    """First-order estimates of what patching each expert at each position does to a metric.

    ``data``: effect[metric?, layer, expert, pos, example?], the estimates; baseline and clean[metric?, example?], the
    metric of both runs; is_used[layer, expert, pos, example], whether either run uses the expert there (for outputs:
    both). Where the metric is a plain number, an estimate is of that position in all examples together.
    """

    exact: Callable[[Cells], NDArray[Any]] | None = None  # patches cells exactly; None once loaded from a file

    def by_expert(self, metric: str | None = None) -> pd.DataFrame:
        """Estimates by layer and expert, summed over positions, mean over examples; largest first.

        The sum is the estimate for patching the expert at all positions together.
        """
        summed = self.of_metric(metric)["effect"].sum("pos")
        mean = summed.mean("example") if "example" in summed.dims else summed
        table = mean.to_dataframe(name="estimate").reset_index()[["layer", "expert", "estimate"]]
        order = table["estimate"].abs().sort_values(ascending=False, kind="stable").index
        return table.loc[order].reset_index(drop=True)

    def agreement(self, n: int = 32, seed: int = 0, metric: str | None = None) -> Agreement:
        """Patch a sample of cells exactly: half of it the largest estimates, half drawn from the other used cells.

        Means over examples are compared. The last agreement is kept, saved with the result, and part of the summary.

        Args:
            n: Cells; at least 2. Fewer are patched where the runs use fewer; without one, all numbers are NaN.
            seed: Of the draw.
            metric: Of several metrics, which; the first by default.

        Raises:
            ConfigError: a result that was loaded from a file: the model is not there.
        """
        n, seed = check_whole(n, "n", 2), check_seed(seed)
        if self.exact is None:
            raise ConfigError(
                "agreement of a result that was loaded",
                "a result that attribution has just returned, which has its model",
                "Run attribution again; its summary keeps the agreement that was measured then.",
            )
        cells, n_top = self._sample(n, seed, metric)
        estimate = self.mean(metric).transpose(*self.cell_axes).values
        names = self.data[METRIC].values.tolist() if METRIC in self.data.dims else [None]
        values = self.exact(cells)[0 if metric is None else names.index(metric)]
        there = np.array([self._there(cell, metric) for cell in cells], dtype=bool).reshape(values.shape)
        exact = np.where(there, values, np.nan)
        exact = np.nanmean(exact, axis=-1) if len(cells) else np.empty(0)
        found = _agreement(np.array([estimate[cell] for cell in cells]), exact, n_top, seed)
        self.data.attrs["agreement"] = asdict(found)
        return found

    def _there(self, cell: tuple[int, ...], metric: str | None) -> NDArray[np.bool_]:
        effect = self.of_metric(metric)["effect"].transpose(*self.cell_axes, ...)
        return ~np.isnan(np.atleast_1d(effect.values[cell]))

    def _sample(self, n: int, seed: int, metric: str | None) -> tuple[Cells, int]:
        mean = np.abs(self.mean(metric).transpose(*self.cell_axes).values).ravel()
        used = (self.data["is_used"].transpose(*self.cell_axes, "example").values > 0).any(axis=-1).ravel()
        candidates = np.flatnonzero(used & ~np.isnan(mean))
        order = candidates[np.argsort(-mean[candidates], kind="stable")]
        top, rest = order[: (n + 1) // 2], order[(n + 1) // 2 :]
        drawn = derive_rng(seed, "agreement").permutation(rest)[: n - len(top)]
        shape = tuple(self.data.sizes[axis] for axis in self.cell_axes)
        places = [np.unravel_index(int(flat), shape) for flat in (*top, *drawn)]
        return [tuple(int(i) for i in place) for place in places], len(top)

    def summary(self) -> str:
        """The largest estimates, and how well the estimates agree with exact patching."""
        attrs, data = self.data.attrs, self.of_metric()
        sizes = " x ".join(f"{self.data.sizes[axis]} {axis}" for axis in self.cell_axes)
        lines = [
            f"Attribution ({attrs['method']}): {sizes}, {attrs['n_examples']} examples; metric {attrs['metrics'][0]}",
            f"corrupted {float(data['baseline'].mean()):.4g}, clean {float(data['clean'].mean()):.4g}",
        ]
        for row in self.by_expert().head(3).to_dict("records"):
            lines.append(
                f"  layer {row['layer']}, expert {row['expert']}: estimate {row['estimate']:+.4g} over positions"
            )
        known = attrs.get("agreement")
        lines.append(
            Agreement(**known).summary()
            if known
            else "Agreement with exact patching was not measured: call agreement(n)."
        )
        return "\n".join(lines)


def _agreement(estimate: NDArray[Any], exact: NDArray[Any], n_top: int, seed: int) -> Agreement:
    def rho(part: slice) -> float:
        return float(spearman(estimate[part], exact[part]).rho) if len(estimate[part]) > 1 else float("nan")

    k = min(N_RECALLED, len(exact))
    largest = set(np.argsort(-np.abs(exact), kind="stable")[:k].tolist())
    ranked = set(np.argsort(-np.abs(estimate), kind="stable")[:k].tolist())
    sizes = np.abs(exact)
    whole = float(sizes.max()) if len(sizes) else 0.0
    random = float(sizes[n_top:].max()) if len(sizes) > n_top else float("nan")
    return Agreement(
        spearman=rho(slice(None)),
        spearman_random=rho(slice(n_top, None)),
        recall=len(largest & ranked) / k if k else float("nan"),
        largest_random=random / whole if whole > 0 else float("nan"),
        n_top=n_top,
        n_random=len(exact) - n_top,
        seed=seed,
    )
