"""The result of expert isolation: per-item values, and every statistic as a table that derives from them."""

from __future__ import annotations

from typing import Any

import pandas as pd
import xarray as xr

from moe_interp.experiments.headlines import isolation_headlines
from moe_interp.experiments.isolation import calibration as calibration_tables
from moe_interp.experiments.isolation import specialization as specialization_tables
from moe_interp.experiments.isolation.data import check_isolation, items_by_domain, with_one_expert_axis
from moe_interp.experiments.isolation.findings import findings_table, summary_text
from moe_interp.experiments.isolation.impact import dominance_table, layer_impact_table
from moe_interp.experiments.isolation.item_calibration import item_calibration_table
from moe_interp.results import Result


class IsolationResult(Result, kind="isolation"):
    """What forcing (or ablating) each expert does to each item.

    ``data`` holds ``delta[mass, baseline, item, layer, expert]`` (nats per answer token, positive = better than the
    baseline), ``delta_first``, the scores, and the natural routing of each item and domain. It is not to be changed in
    place: tables are computed once and kept.

    Experts are whole numbers, ``delta.sel(expert=3)``; texts such as "3+5" where sets were forced together. Natural
    routing is on the axis ``expert`` too where every expert of the model stands alone, else on ``routed_expert``.

    Raises:
        DataError: The dataset is not one of an isolation run, or is incomplete.
    """

    main = "delta"

    check = staticmethod(check_isolation)

    def __init__(self, data: xr.Dataset, **origin: Any) -> None:
        super().__init__(with_one_expert_axis(data), **origin)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, sorted."""
        return tuple(items_by_domain(self.data))

    def specialization(
        self,
        baseline: str = "natural",
        mass: str | None = None,
        alpha: float = 0.05,
        score: str = "mean",
        method: str = "bh",
    ) -> pd.DataFrame:
        """Experts that help or hurt a domain: :func:`.specialization.specialization`."""
        return self.cached(specialization_tables.specialization, baseline, mass, alpha, score, method)

    def mass_agreement(self, baseline: str = "natural", alpha: float = 0.05) -> pd.DataFrame:
        """Where the two masses disagree: :func:`moe_interp.experiments.isolation.specialization.mass_agreement`."""
        return self.cached(specialization_tables.mass_agreement, baseline, alpha)

    def domain_effect(
        self, mass: str | None = None, alpha: float = 0.05, n_permutations: int = 9999, seed: int = 0
    ) -> pd.DataFrame:
        """Specialization between domains: :func:`.specialization.domain_effect_table`."""
        return self.cached(specialization_tables.domain_effect_table, mass, alpha, n_permutations, seed)

    def calibration(self, mass: str | None = None) -> pd.DataFrame:
        """rho per domain and layer: :func:`moe_interp.experiments.isolation.calibration.calibration_table`.

        ``.attrs["domains"]`` holds the rows of :meth:`calibration_by_domain`.
        """
        table = self.cached(calibration_tables.calibration_table, mass)
        table.attrs["domains"] = self.calibration_by_domain(mass).to_dict("records")
        return table

    def calibration_by_domain(self, mass: str | None = None, positions: str = "all", seed: int = 0) -> pd.DataFrame:
        """rho averaged over layers, with interval, permutation p, reliability and correction:
        :func:`moe_interp.experiments.isolation.calibration.calibration_by_domain`."""

        def compute(data: xr.Dataset, mass: str | None, positions: str, seed: int) -> pd.DataFrame:
            return calibration_tables.calibration_by_domain(data, mass, positions, seed=seed)

        return self.cached(compute, mass, positions, seed)

    def item_calibration(self, mass: str | None = None, score: str = "mean") -> pd.DataFrame:
        """rho within each item: :func:`moe_interp.experiments.isolation.item_calibration.item_calibration_table`."""
        return self.cached(item_calibration_table, mass, score)

    def dominance(self, by_layer: bool = False) -> pd.DataFrame:
        """Share of the slots against even use: :func:`moe_interp.experiments.isolation.impact.dominance_table`."""
        return self.cached(dominance_table, by_layer)

    def layer_impact(self, baseline: str = "natural", mass: str | None = None) -> pd.DataFrame:
        """Worth of each layer's best expert: :func:`moe_interp.experiments.isolation.impact.layer_impact_table`."""
        return self.cached(layer_impact_table, baseline, mass)

    def calibration_points(self, mass: str | None = None) -> pd.DataFrame:
        """What calibration correlates: :func:`moe_interp.experiments.isolation.calibration.calibration_points`."""
        return self.cached(calibration_tables.calibration_points, mass)

    def findings_table(self) -> pd.DataFrame:
        """Beside the published numbers: :func:`moe_interp.experiments.isolation.findings.findings_table`."""
        return findings_table(self)

    def headlines(self) -> list[str]:
        """What was done and three findings, a sentence each:
        :func:`moe_interp.experiments.headlines.isolation_headlines`."""
        return isolation_headlines(self)

    def summary(self) -> str:
        """The run in plain words: what was done, what it could show, what it shows."""
        return summary_text(self)

    def __repr__(self) -> str:
        return super().summary()
